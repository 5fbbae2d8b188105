"""What a run tells programs: `metrics.jsonl`.

Each line of `metrics.jsonl` has `step` and `epoch`. Training lines add, as means since the line before, `train/loss`
(the objective: label smoothing is part of it), `train/top1` and, of more than five classes, `train/top5` (shares, 0 to 1), `lr`,
and, without compilation and tests, `images_per_second`, `waiting_for_data` (share of the time that the devices had nothing to
do for want of images), `multiply_adds_per_second` and, where the devices' peak is known, `peak_share`. Test lines, one per epoch,
add `eval/loss`, `eval/top1` and `eval/top5` over all test images, and `eval/images`, their number.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from train.run.trackers import Tracker

RUN_AHEAD = 2
"""Steps that may be under way on the device while the host prepares the next."""
SLOW_INPUT = 0.1
"""Share of the time, in a window of a second or more, above which waiting for data is worth a warning."""


class Metrics:
    """`metrics.jsonl`: one JSON object per line, each with `step` and `epoch`, written out at once; and to trackers."""

    def __init__(self, path: Path | None, first_step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        """Append to `path`; lines past `first_step`, of work that a resumed run does again, go. None: write nowhere."""
        self._trackers = trackers
        self._file = None
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= first_step] if path.exists() else []
        if path.exists() and (damaged := path.read_bytes().count(b"\n") - len(read_metrics(path))):
            print(f"warning: {damaged} lines of {path} are damaged and left out", file=sys.stderr)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def write(self, step: int, **values: float) -> None:
        """Write one line. Keys may hold a slash: `write(3, **{"train/loss": 0.1})`."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(step, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one cut off in mid-write, or damaged on disk, is left out."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int) and "epoch" in line]


class MetricsWindow:
    """Training metrics since the last look at them. They stay on the device until then.

    The host runs two steps ahead of the device and no further, so that no more batches than that are on the device.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        waited: Callable[[], float] = lambda: 0.0,
        multiply_adds: int = 0,
        peak: float | None = None,
    ) -> None:
        """The number of images in a step and what they cost.

        Args:
            batch_size: images in a step, all devices together.
            waited: seconds that the run has lost for want of data so far.
            multiply_adds: of training on one image; 0 where they are not known.
            peak: multiply-adds a second of all devices together, where it is known.
        """
        self._batch_size, self._waited, self._multiply_adds, self._peak = batch_size, waited, multiply_adds, peak
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []
        self.slow_input = False
        """Whether more of the last window, a second or longer, was spent waiting for data than is well."""
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what has passed so far (a compilation, a test) out of images/s."""
        self._since, self._waited_before, self._timed_steps = time.perf_counter(), self._waited(), 0

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Take in what step number `step` returned."""
        self._steps.append((step, values))
        self._timed_steps += 1
        if len(self._steps) > RUN_AHEAD:
            jax.block_until_ready(self._steps[-RUN_AHEAD - 1])

    def idle(self) -> bool:
        """Whether the device has done all that it was given."""
        return not self._steps or all(value.is_ready() for value in self._steps[-1][1].values())  # type: ignore[attr-defined]

    def close(self) -> dict[str, float]:
        """Means over the window as `train/loss`, …, and its speed; the next window begins.

        Raises:
            FloatingPointError: a loss is not finite; the first such step is named.
        """
        steps = jax.device_get(self._steps)
        for step, values in steps:
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"the training loss is {values['loss']} at step {step}")
        means = {f"train/{key}": float(np.mean([values[key] for _, values in steps])) for key in steps[0][1]}
        if self._timed_steps:
            means |= self._speed(time.perf_counter() - self._since, self._waited() - self._waited_before)
        self._steps = []
        self.restart_clock()
        return means

    def _speed(self, seconds: float, waited: float) -> dict[str, float]:
        rate = self._timed_steps * self._batch_size / seconds
        self.slow_input = seconds >= 1 and waited > SLOW_INPUT * seconds
        speed = {"images_per_second": round(rate, 1), "waiting_for_data": round(waited / seconds, 4)}
        if self._multiply_adds:
            speed["multiply_adds_per_second"] = float(f"{rate * self._multiply_adds:.4g}")
            if self._peak:
                speed["peak_share"] = round(rate * self._multiply_adds / self._peak, 4)
        return speed


def best_line(tested: list[dict[str, Any]]) -> dict[str, Any]:
    """Of lines with `eval/top1`, the best; the latest among equals."""
    return max(reversed(tested), key=lambda line: line["eval/top1"])
