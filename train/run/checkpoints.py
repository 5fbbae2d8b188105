"""Training states on disk: Orbax behind a few operations. The only file that knows Orbax.

A checkpoint is `checkpoints/STEP/` with three items: `state`, the arrays; `about`, the config, the number of devices and of
training images, and of each array its shape, dtype and CRC-32; `metrics`, the test metrics, where there are any. Its step is
also the position in the data and, with the config's seed, all there is to know of the random numbers. Orbax writes a step
whole or not at all; what happens to the files afterwards is found by the checksums, and the step before takes its place.
"""

import errno
import json
import os
import sys
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from train.config import CheckpointError, ConfigError


class DamagedError(Exception):
    """A checkpoint whose files are not what was written."""


class Checkpoints:
    """The checkpoints of a run: the latest `keep` steps and the one of the best `eval/top1`.

    Written by a thread of its own, while training goes on. Only one process may have a folder open.
    """

    def __init__(self, workdir: Path | None, keep: int, config: dict[str, Any] | None = None, images: int | None = None) -> None:
        """Open the folder; None stands for one that nothing is found in nor written to: another host has it.

        Args:
            workdir: the folder of the run.
            keep: latest steps to keep.
            config: to be stored with each checkpoint, as JSON.
            images: in the training set, in whose order a step is a position.
        """
        self._config, self._images, self._keep = config or {}, images, keep
        self.devices = jax.device_count()
        """On how many the state that was restored had been computed."""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._manager: ocp.CheckpointManager | None = None
        if workdir is not None:
            self.directory = workdir.resolve() / "checkpoints"

    def __enter__(self) -> Self:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._without_noise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        failed = True
        try:
            if kind is None:
                self.wait()
                failed = False
        finally:
            self._writer.shutdown()  # what is being written is written to the end
            if self._manager is not None:
                self._manager.close()
            if not failed:  # else those threads may go on talking until the process ends
                sys.unraisablehook = self._hook

    def _without_noise(self, unraisable: Any) -> None:
        """Keep back what TensorStore's threads say when Orbax, after an error, no longer waits for them."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def steps(self) -> list[int]:
        """The steps saved, rising."""
        if not hasattr(self, "directory") or not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())  # others: not finished

    def latest(self) -> int | None:
        """The last step saved; None before the first."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the best `eval/top1`, of equals the last; None where none was tested."""
        tested = {step: top1 for step in self.steps() if (top1 := _top1(self.directory / str(step))) is not None}
        return max(tested, key=lambda step: (tested[step], step), default=None)

    def save(self, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copy `state` to the host and begin to write it under its step, unless that step is there already.

        An error of the writing is raised by the next `save`, `check` or `wait`:

        Raises:
            FloatingPointError: a value of the state is not finite. Nothing was written.
            CheckpointError: the files could not be written.
        """
        self.wait()
        if hasattr(self, "directory") and int(state.step) not in self.steps():
            # Copied for sure: on CPU the host's array may be the device's memory, which the next step overwrites.
            state = jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(state))
            self._writing = self._writer.submit(self._write, state, metrics)

    def check(self) -> None:
        """Raise the error of a write that has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write to end, and raise its error."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def restore(self, like: Any, step: int | None = None, move_damaged: bool = False) -> Any:
        """A state, as NumPy arrays: the latest that is whole. A damaged one is told on stderr.

        Args:
            like: a state of the same structure, or its shapes.
            step: this one and no other.
            move_damaged: to `damaged/` in the run's folder, out of the way of the steps to come. Nothing is ever deleted.

        Raises:
            ConfigError: there is no checkpoint, none is whole (with `step`: it is not), or it holds other arrays than `like`.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                state = self._read(candidate, like)
            except DamagedError as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                note = f"warning: the checkpoint of step {bad} is damaged ({reason}); step {candidate} takes its place"
                if move_damaged:
                    note += f". It is kept in {self._set_aside(bad)}"
                print(note, file=sys.stderr)
            return state
        if not damaged:
            raise ConfigError(f"no checkpoint in {self.directory}")
        if step is not None:
            raise ConfigError(
                f"the checkpoint of step {step} in {self.directory} is damaged: {damaged[step]}; others may be whole"
            )
        found = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
        raise ConfigError(f"no checkpoint in {self.directory} is whole ({found}): restore one from a copy, or start another run")

    def _write(self, state: Any, metrics: dict[str, float] | None) -> None:
        step = int(state.step)
        for name, leaf in _named_leaves(state).items():
            if not np.isfinite(leaf).all():
                raise FloatingPointError(f"{name} is not finite at step {step}")
        about = {"step": step, "config": self._config, "devices": jax.device_count(), "images": self._images}
        about["arrays"] = _fingerprints(state)
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about | {"crc32": _crc_of(about)})}
        try:
            self._open().save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        except Exception as error:  # Orbax and TensorStore raise what they like
            raise CheckpointError(f"the checkpoint of step {step} cannot be written: {_reason(error)}") from error

    def _open(self) -> ocp.CheckpointManager:
        """Orbax, in this process alone; opened for the first write, for it reads the metrics of all steps and removes rests."""
        if self._manager is None:
            for step in self.steps():
                if (self.directory / str(step) / "metrics").is_dir() and _top1(self.directory / str(step)) is None:
                    print(
                        f"warning: the metrics of step {step} are damaged; it is kept in {self._set_aside(step)}", file=sys.stderr
                    )
            self.directory.mkdir(parents=True, exist_ok=True)
            alone = _this_process_alone()
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy([LatestN(self._keep), _BEST]),
                    best_fn=_BEST.get_metric_fn,  # has the metrics written; what is kept is decided by the policy alone
                    enable_async_checkpointing=False,
                    create=False,
                    cleanup_tmp_directories=True,  # of writes that were killed
                    multiprocessing_options=alone,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                    "about": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                },
            )
        return self._manager

    def _read(self, step: int, like: Any) -> Any:
        folder = self.directory / str(step)
        try:
            json.loads((folder / "_CHECKPOINT_METADATA").read_text())
            if not ocp.utils.is_checkpoint_finalized(folder):
                raise DamagedError("a file that Orbax writes at the end is missing")
            about = json.loads((folder / "about" / "metadata").read_text())
            crc = about.pop("crc32")
            arrays = about["arrays"]
            if crc != _crc_of(about):
                raise DamagedError("about/metadata does not fit its checksum")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedError(_first_line(error)) from error
        if (folder / "metrics").is_dir() and _top1(folder) is None:
            raise DamagedError("metrics/metrics cannot be read")
        wanted = {name: (list(leaf.shape), leaf.dtype.name) for name, leaf in _named_leaves(like).items()}
        found = {name: (array["shape"], array["dtype"]) for name, array in arrays.items()}
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if differing:
            name = differing[0]
            there, here = (_described(side.get(name)) for side in (found, wanted))
            same_model = all(other.startswith(("opt_state/", "ema/")) for other in differing)
            other = "optimizer: keep optim.name, and whether there is optim.ema, as they were" if same_model else "model"
            raise ConfigError(f"the checkpoint {folder} is of another {other}; {name} is {there} there, {here} here")
        images = about.get("images", self._images)
        if self._images not in (None, images):
            raise ConfigError(
                f"the checkpoint {folder} was written with {images} training images, and now there are {self._images}: its step "
                "is no position in these. Bring back the images of then, or begin another run with its weights (--init)"
            )
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        try:
            alone = _this_process_alone()
            handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
                state = reader.restore(folder / "state", args=ocp.args.StandardRestore(like))
        except Exception as error:
            raise DamagedError(f"state: {_first_line(error)}") from error
        for name, fingerprint in _fingerprints(state).items():
            if fingerprint != arrays[name]:
                raise DamagedError(f"{name} does not fit its checksum")
        self.devices = about["devices"]
        return state

    def _set_aside(self, step: int) -> Path:
        """Move a step out of the way of Orbax, which writes only steps later than the last."""
        folder = self.directory.parent / "damaged"
        folder.mkdir(exist_ok=True)
        place = next(place for n in range(1000) if not (place := folder / (f"{step}-{n}" if n else str(step))).exists())
        (self.directory / str(step)).rename(place)
        return place


_BEST = BestN(get_metric_fn=lambda metrics: metrics["eval/top1"], n=1, keep_checkpoints_without_metrics=False)
_hashing = ThreadPoolExecutor(4, "crc32")


def _this_process_alone() -> ocp.options.MultiprocessingOptions:
    """Orbax would wait for the other hosts, which have no part in this."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(process, active_processes={process})


def _top1(step: Path) -> float | None:
    try:
        return float(json.loads((step / "metrics" / "metrics").read_text())["eval/top1"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprints(tree: Any) -> dict[str, dict[str, Any]]:
    """Name → shape, dtype and CRC-32 of each array."""
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in _named_leaves(tree).items()}
    sums = _hashing.map(lambda leaf: zlib.crc32(leaf.reshape(-1).view(np.uint8)), leaves.values())
    return {
        name: {"shape": list(np.shape(leaf)), "dtype": leaf.dtype.name, "crc32": crc}
        for (name, leaf), crc in zip(_named_leaves(tree).items(), sums, strict=True)
    }


def _crc_of(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _described(array: tuple[list[int], str] | None) -> str:
    return "absent" if array is None else f"{tuple(array[0])} {array[1]}"


def _reason(error: BaseException) -> str:
    """What the system said, where the message quotes it; else its first line."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    return next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), _first_line(error))


def _first_line(error: BaseException) -> str:
    """What went wrong, in a line: the message of the innermost error that has one."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


def _named_leaves(tree: Any) -> dict[str, Any]:
    """`params/conv1/kernel` → leaf."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
