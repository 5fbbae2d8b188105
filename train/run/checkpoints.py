"""Checkpoints of the training state, written and read by Orbax.

A checkpoint is `checkpoints/STEP/` with three items: `state`, the arrays; `about`, the config, classes, the numbers of devices
and training images, and the shape, dtype and CRC-32 of each array; `metrics`, the test metrics, if there are any. The step also
gives the position in the data and, with the config's seed, all random numbers. Orbax writes a step completely or not at all. Each
step is looked up when it is written. Checksums find later damage; the previous step then replaces the damaged one.
"""

import errno
import json
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

import scconv_jax
from train.config import CheckpointError, ConfigError
from train.run.workdir import OpenFolder


class DamagedError(Exception):
    """The files of a checkpoint have changed since they were written."""


class Checkpoints:
    """The checkpoints of a run: the latest `keep` steps and the step with the best `eval/top1`.

    A thread writes them while training continues. Only one process may have a folder open. On Linux, the run's folder may be
    renamed meanwhile.
    """

    def __init__(
        self,
        workdir: Path | None,
        keep: int,
        config: dict[str, Any] | None = None,
        images: int | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Open the checkpoints in the folder of a run. With None, for hosts other than 0, `save` does nothing.

        `config`, `images` (the number of training images) and `classes` are stored with each checkpoint. A restored step
        identifies a position in the data only if the number of images is the same, and outputs mean the same only if the classes
        are.
        """
        self._config, self._images, self._classes, self._keep = config or {}, images, list(classes), keep
        self.devices = jax.device_count()
        """Number of devices that computed the restored state."""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._folder = None if workdir is None else OpenFolder(workdir)

    def __enter__(self) -> Self:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._without_noise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
                sys.unraisablehook = self._hook  # after an error, the messages may continue until the process ends
        finally:
            self._writer.shutdown()  # waits for the current write
            if self._manager is not None:
                self._manager.close()
            if self._folder is not None:
                self._folder.close()

    def _without_noise(self, unraisable: Any) -> None:
        """Suppress the messages of TensorStore's threads, for which Orbax does not wait after an error."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    @property
    def workdir(self) -> Path:
        """The run's folder: as given, or its new path if it was renamed."""
        assert self._folder is not None, "only host 0 has a folder"
        return self._folder.path()

    def _plain(self) -> Path:
        assert self._folder is not None, "only host 0 has a folder"
        return self._folder.plain()

    @property
    def directory(self) -> Path:
        """Absolute path of the folder of all steps."""
        return self.workdir.resolve() / "checkpoints"

    def steps(self) -> list[int]:
        """Return the saved steps, ascending."""
        return scconv_jax.runs.steps(self.directory) if self._folder is not None else []

    def latest(self) -> int | None:
        """Return the last saved step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the best `eval/top1`, the latest if several are equal. None if no step was tested."""
        return scconv_jax.runs.best_step(self.directory)

    def save(self, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copy `state` to the host and start to write it. If a checkpoint of its step exists, add the metrics that it lacks.

        The next `save`, `check` or `wait` raises the error of a failed write.

        Raises:
            FloatingPointError: A value of the state is not finite. Nothing was written.
            CheckpointError: The files could not be written.
        """
        self.wait()
        if self._folder is None:
            return
        step = int(state.step)
        if step not in self.steps():
            # An explicit copy: on CPU, device_get may return the device's memory, which the next step overwrites.
            state = jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(state))
            self._writing = self._writer.submit(self._write, state, metrics)
        elif metrics is not None and not self.is_tested(step):
            complete, metrics_folder = self.directory / str(step) / "tested", self.directory / str(step) / "metrics"
            complete.mkdir(exist_ok=True)
            (complete / "metrics").write_text(json.dumps(metrics))
            complete.rename(metrics_folder)

    def is_tested(self, step: int) -> bool:
        """Return whether a saved step has test metrics."""
        return scconv_jax.runs.eval_top1(self.directory, step) is not None

    def check(self) -> None:
        """Raise the error of a finished write."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the current write and raise its error."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def restore(self, like: Any, step: int | None = None, repair: bool = False) -> Any:
        """Return a saved state as NumPy arrays, and report damaged checkpoints on stderr.

        Args:
            like: A state of the same structure, or its shapes.
            step: Step to restore. If None, the latest undamaged one.
            repair: Complete checkpoints that Orbax did not, and move damaged ones to `damaged/` in the run's folder. Nothing is
                ever deleted.

        Raises:
            ConfigError: There is no checkpoint, all (or the given step) are damaged, or the classes or arrays differ.
        """
        self.wait()
        for saved in self.steps() if repair else ():
            try:
                if scconv_jax.runs.complete(self.directory / str(saved) / "state"):
                    print(f"completed the checkpoint of step {saved}, which Orbax had left incomplete")
            except Exception as error:
                if reason := _system_reason(error):
                    raise ConfigError(f"the checkpoint of step {saved} cannot be completed: {reason}") from error
                # Otherwise it is damaged, as reading it will show.
        damaged: dict[int, str] = {}
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                state = self._read(candidate, like)
            except DamagedError as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                note = f"warning: the checkpoint of step {bad} is damaged ({reason}); using step {candidate} instead"
                if repair:
                    note += f". It was moved to {self._set_aside(bad)}"
                print(note, file=sys.stderr)
            return state
        if not damaged:
            raise ConfigError(f"no checkpoint in {self.directory}")
        if step is not None:
            raise ConfigError(
                f"the checkpoint of step {step} in {self.directory} is damaged: {damaged[step]}. Other steps may be intact"
            )
        found = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
        raise ConfigError(
            f"all checkpoints in {self.directory} are damaged ({found}): restore one from a backup, or start a new run"
        )

    def _write(self, state: Any, metrics: dict[str, float] | None) -> None:
        step = int(state.step)
        for name, leaf in _named_leaves(state).items():
            if not np.isfinite(leaf).all():
                raise FloatingPointError(f"{name} is not finite at step {step}")
        about = {"step": step, "config": self._config, "devices": jax.device_count(), "images": self._images}
        about |= {"classes": self._classes, "arrays": _fingerprints(state)}
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about | {"crc32": _crc_of(about)})}
        try:
            self._open().save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
            self._look_up(step, tested=metrics is not None)
        except Exception as error:  # Orbax and TensorStore raise many types
            reason = _system_reason(error) or _first_line(error).replace(str(self._plain()), str(self.workdir))
            raise CheckpointError(f"the checkpoint of step {step} cannot be written: {reason}") from error

    def _look_up(self, step: int, tested: bool) -> None:
        """Find everything that was just written: Orbax only logs some failures. The values of arrays are not read again."""
        state = self.directory / str(step) / "state"
        scconv_jax.runs.complete(state)
        wanted = {name: tuple(array["shape"]) for name, array in self._about(step)["arrays"].items()}
        if missing := sorted(wanted.items() - scconv_jax.runs.shapes(state).items()):
            raise OSError(f"{len(missing)} of {len(wanted)} arrays are not found in {state}, among them {missing[0][0]}")
        if tested and scconv_jax.runs.eval_top1(self.directory, step) is None:
            raise OSError(f"the metrics are not found in {state.parent}")

    def _open(self) -> ocp.CheckpointManager:
        """Return the Orbax manager. The first call opens it, which reads all metrics and removes leftovers."""
        if self._manager is None:
            for step in self.steps():
                if (self.directory / str(step) / "metrics").is_dir() and scconv_jax.runs.eval_top1(self.directory, step) is None:
                    print(
                        f"warning: the metrics of step {step} are damaged; the checkpoint was moved to {self._set_aside(step)}",
                        file=sys.stderr,
                    )
            # By its own path, Orbax does not find what it wrote in a folder called `run[1]`, and does not notice a new name.
            directory = self._plain() / "checkpoints"
            directory.mkdir(exist_ok=True)
            alone = scconv_jax.runs.this_process_alone()
            self._manager = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy([LatestN(self._keep), _BEST]),
                    best_fn=_BEST.get_metric_fn,  # makes Orbax write the metrics; the policy decides what is kept
                    enable_async_checkpointing=False,
                    create=False,
                    cleanup_tmp_directories=True,  # left by killed writes
                    multiprocessing_options=alone,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                    "about": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                },
            )
        return self._manager

    def _about(self, step: int) -> dict[str, Any]:
        """Return the item `about` of a finished checkpoint."""
        folder = self.directory / str(step)
        try:
            json.loads((folder / "_CHECKPOINT_METADATA").read_text())
            if not ocp.utils.is_checkpoint_finalized(folder):
                raise DamagedError("the file that Orbax writes last is missing")
            about = json.loads((folder / "about" / "metadata").read_text())
            crc = about.pop("crc32")
            if crc != _crc_of(about):
                raise DamagedError("the checksum of about/metadata does not match")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedError(_first_line(error)) from error
        if (folder / "metrics").is_dir() and scconv_jax.runs.eval_top1(self.directory, step) is None:
            raise DamagedError("metrics/metrics cannot be read")
        return about

    def _read(self, step: int, like: Any) -> Any:
        folder, about = self.directory / str(step), self._about(step)
        arrays = about["arrays"]
        if (classes := about.get("classes")) and self._classes and classes != self._classes:
            raise ConfigError(f"the checkpoint {folder} was trained on {_other_classes(classes, self._classes)}")
        wanted = {name: f"{tuple(leaf.shape)} {leaf.dtype.name}" for name, leaf in _named_leaves(like).items()}
        found = {name: f"{tuple(array['shape'])} {array['dtype']}" for name, array in arrays.items()}
        differing = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
        if differing:
            same_model = all(name.startswith(("opt_state/", "ema/")) for name in differing)
            name = min(differing, key=lambda name: (not name.startswith("params/"), name))
            there, here = found.get(name, "absent"), wanted.get(name, "absent")
            cause = "optimizer: keep optim.name, optim.freeze and the use of optim.ema unchanged" if same_model else "model"
            raise ConfigError(f"the checkpoint {folder} has another {cause}; {name} is {there} in it, {here} here")
        images = about.get("images", self._images)
        if self._images not in (None, images):
            raise ConfigError(
                f"the checkpoint {folder} was written with {images} training images, but there are {self._images} now. The "
                "dataset has changed, so the step no longer identifies a position in it. Restore the original dataset, or start "
                "a new run from these weights (--init)"
            )
        try:
            state = scconv_jax.runs.restore(folder / "state", like)
        except Exception as error:
            raise DamagedError(f"state: {_first_line(error)}") from error
        for name, fingerprint in _fingerprints(state).items():
            if fingerprint != arrays[name]:
                raise DamagedError(f"the checksum of {name} does not match")
        self.devices = about["devices"]
        return state

    def _set_aside(self, step: int) -> Path:
        """Move a step to `damaged/`: Orbax writes only steps after the last one."""
        folder = self.directory.parent / "damaged"
        folder.mkdir(exist_ok=True)
        place = next(place for n in range(1000) if not (place := folder / (f"{step}-{n}" if n else str(step))).exists())
        (self.directory / str(step)).rename(place)
        return place


_BEST = BestN(get_metric_fn=lambda metrics: metrics["eval/top1"], n=1, keep_checkpoints_without_metrics=False)
_hashing = ThreadPoolExecutor(4, "crc32")


def _fingerprints(tree: Any) -> dict[str, dict[str, Any]]:
    """Return the shape, dtype and CRC-32 of each array by name."""
    leaves = _named_leaves(tree)
    sums = _hashing.map(lambda leaf: zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data), leaves.values())
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "crc32": crc}
        for (name, leaf), crc in zip(leaves.items(), sums, strict=True)
    }


def _crc_of(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _other_classes(before: list[str], now: list[str]) -> str:
    """Return the end of an error message about a data set with other classes."""
    advice = "the outputs would mean other classes. Name the images of the run, or start from its weights (--init)"
    if len(before) != len(now):
        return f"{len(before)} classes, but the data set here has {len(now)}: {advice}"
    index = next(index for index, name in enumerate(before) if name != now[index])
    return f"other classes: class {index} is {before[index]!r} there and {now[index]!r} in the data set here, so {advice}"


def _system_reason(error: BaseException) -> str:
    """Return the system's reason if the message of Orbax or TensorStore quotes one, such as a full disk, else an empty string."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    return next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by name (`params/conv1/kernel`)."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
