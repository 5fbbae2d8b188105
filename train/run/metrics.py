"""`metrics.jsonl`: one JSON object per line, each with `step`, `epoch` and `seconds`, the time of training so far.

`seconds` includes start-up, compilation, training and tests, in all parts of a run that was resumed. It leaves out the work of a
killed part after its last line, because the next part repeats that work. A run that an earlier version began has no `seconds`.

Training lines hold means since the previous training line:

- `train/loss` (the objective, label smoothing included), `train/top1` and, with more than five classes, `train/top5`; `lr`;
- excluding compilation and tests: `images_per_second`, `waiting_for_data` (share of the time that the devices were idle because
  no batch was ready), `multiply_adds_per_second` and, if the devices' peak is known, `peak_share`.

Test lines, one per epoch, hold `eval/loss`, `eval/top1`, `eval/top5` and `eval/images`, the number of test images
that could be read.
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

import scconv_jax
from train.run.trackers import Tracker

RUN_AHEAD = 2
"""Steps that may run on the device while the host prepares the next."""
SLOW_INPUT = 0.1
"""Share of the time spent waiting for data, over a second or more, above which the run warns."""


class Metrics:
    """Writes metrics to `metrics.jsonl`, flushed after every line, and to trackers."""

    def __init__(
        self, path: Path | None, first_step: int = 0, trackers: Sequence[Tracker] = (), *, began: float | None = None
    ) -> None:
        """Append to `path`, if given. Lines after `first_step`, which a resumed run repeats, are removed.

        `began` is when this part of the run began, by `time.perf_counter`. If None, now.
        """
        self._trackers = trackers
        self._file = None
        self._began: float | None = time.perf_counter() if began is None else began
        if path is None:
            return
        lines = read_metrics(path) if path.exists() else []
        if path.exists() and (damaged := path.read_bytes().count(b"\n") - len(lines)):
            print(f"warning: {damaged} damaged lines of {path} were left out", file=sys.stderr)
        kept = [line for line in lines if line["step"] <= first_step]
        before = _seconds(kept)
        self._began = None if before is None else self._began - before
        with scconv_jax.files.replacing(path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    @property
    def seconds(self) -> float | None:
        """Time of training so far, in all parts of the run; None if it is not known of the earlier parts."""
        return None if self._began is None else time.perf_counter() - self._began

    def write(self, step: int, **values: float) -> None:
        """Write one line: `write(3, **{"train/loss": 0.1})`."""
        if self._file is not None:
            seconds = {} if self.seconds is None else {"seconds": round(self.seconds, 1)}
            self._file.write(json.dumps({"step": step, **values, **seconds}, allow_nan=False) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(step, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, without incomplete or damaged ones."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int) and "epoch" in line]


def seconds_of(workdir: Path) -> float | None:
    """Return the time of training of a run so far. None if it is not known."""
    path = workdir / "metrics.jsonl"
    return _seconds(read_metrics(path)) or None if path.exists() else None


def _seconds(lines: list[dict[str, Any]]) -> float | None:
    found = lines[-1].get("seconds") if lines else 0
    return float(found) if isinstance(found, int | float) else None


class MetricsWindow:
    """Training metrics since the last line. They stay on the device until the next line.

    The host runs at most `RUN_AHEAD` steps ahead of the device, which bounds the number of batches on the device.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        waited: Callable[[], float] = lambda: 0.0,
        multiply_adds: int = 0,
        peak: float | None = None,
    ) -> None:
        """Start a window.

        Args:
            batch_size: Images per step, over all devices.
            waited: Returns the seconds that the devices have waited for data so far.
            multiply_adds: Multiply-adds of training on one image, or 0 if unknown.
            peak: Peak multiply-adds per second of all devices together, or None if unknown.
        """
        self._batch_size, self._waited, self._multiply_adds, self._peak = batch_size, waited, multiply_adds, peak
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []
        self.slow_input = False
        """Whether the last window waited for data for more than `SLOW_INPUT` of its time."""
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time so far (a compilation, a test) from images/s."""
        self._since, self._waited_before, self._timed_steps = time.perf_counter(), self._waited(), 0

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Add the metrics of one step."""
        self._steps.append((step, values))
        self._timed_steps += 1
        if len(self._steps) > RUN_AHEAD:
            jax.block_until_ready(self._steps[-RUN_AHEAD - 1])

    def idle(self) -> bool:
        """Return whether the device has finished all its steps."""
        return not self._steps or all(value.is_ready() for value in self._steps[-1][1].values())  # type: ignore[attr-defined]

    def close(self) -> dict[str, float]:
        """Return the means over the window (`train/loss`, …) and its speed, and start the next window."""
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
    """Return the line with the best `eval/top1`, by the rule for checkpoints: the latest if several are equal."""
    best = scconv_jax.runs.best_of({line["step"]: line["eval/top1"] for line in tested})
    return next(line for line in reversed(tested) if line["step"] == best)


def epochs_without_progress(workdir: Path) -> int:
    """Return the number of tests of a run since the first with the best `eval/top1`."""
    path = workdir / "metrics.jsonl"
    tested = [line["eval/top1"] for line in read_metrics(path) if "eval/top1" in line] if path.exists() else []
    return len(tested) - 1 - tested.index(max(tested)) if tested else 0
