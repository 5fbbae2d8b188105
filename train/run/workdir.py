"""The folder of a run: which one it is, and that nothing in it is overwritten by mistake.

A folder holds a run when it holds `config.json`, which is written before any metrics or checkpoint.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NoReturn, TextIO

from train.config import Config, ConfigError
from train.config.fields import nearest
from train.config.files import differences, from_json, to_json

RUNS = Path("runs")
FIXED = ("model.name", "data.name", "data.batch_size", "data.synthetic_train", "data.synthetic_classes")
"""Fields that a run keeps for life: what its parameters fit, and what its step number means."""


def holds_run(workdir: Path) -> bool:
    """Whether a run has begun there: one that lost its config is a run, too, and not to be overwritten."""
    return (workdir / "config.json").is_file() or (workdir / "checkpoints").is_dir()


def fresh_workdir(name: str) -> Path:
    """`runs/NAME`, or `runs/NAME-2`, `-3`, … where that holds a run."""
    return next(workdir for workdir in _numbered(name) if not holds_run(workdir))


def latest_workdir(name: str) -> Path:
    """The last of `runs/NAME`, `runs/NAME-2`, … that holds a run; `runs/NAME` where none does."""
    latest = RUNS / name
    for workdir in _numbered(name):
        if not holds_run(workdir):
            return latest
        latest = workdir
    raise AssertionError("unreachable")


def load_run(workdir: Path) -> Config:
    """The config of the run in `workdir`.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if not (workdir / "config.json").is_file():
        if holds_run(workdir):
            raise ConfigError(f"{workdir} holds checkpoints, but no config.json: put it back, or choose another --workdir")
        runs = [str(path.parent) for path in sorted(workdir.parent.glob("*/config.json"))]
        raise ConfigError(f"no run in {workdir}: it has no config.json{nearest(str(workdir), runs)}")
    return from_json((workdir / "config.json").read_text(errors="replace"), str(workdir / "config.json"))


def check_same_run(workdir: Path, old: Config, new: Config) -> list[str]:
    """What `new` changes in the run in `workdir`, a line per field.

    Raises:
        ConfigError: it changes what a run keeps for life.
    """
    changes = differences(old, new)
    fixed = [f"{name} {changes[name][0]!r}, not {changes[name][1]!r}" for name in FIXED if name in changes]
    if fixed:
        raise ConfigError(f"{workdir} holds a run with {'; '.join(fixed)}: keep that, or start another run in another --workdir")
    return [f"{name}: {before!r} → {after!r}" for name, (before, after) in changes.items()]


def refuse_held(workdir: Path, new: Config) -> NoReturn:
    """Say that a run is in `workdir` already, and how its config differs from `new`.

    Raises:
        ConfigError: always.
    """
    changes = [f"{name} {old!r}, not {new!r}" for name, (old, new) in differences(load_run(workdir), new).items()]
    with_ = f", with {'; '.join(changes)}" if changes else ""
    raise ConfigError(f"{workdir} holds a run already{with_}: add --resume to go on with it, or choose another --workdir")


@contextmanager
def locked_workdir(workdir: Path | None) -> Iterator[None]:
    """Make the folder, see that it can be written, and keep every other process out of it; None: nothing to do.

    The kernel lifts the lock when this process ends, however it ends.

    Raises:
        ConfigError: it cannot be written, or another process holds it.
    """
    if workdir is None:
        yield
        return
    with open_workdir(workdir) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{workdir} is in use by {file.read().strip() or 'another process'}: wait for it, or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def open_workdir(workdir: Path) -> TextIO:
    """Make the folder, if it is not there, and open its lock.

    Raises:
        ConfigError: it cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return (workdir / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"cannot write to the workdir {workdir}: {error.strerror}; choose another --workdir") from error


def save_config(workdir: Path, config: Config) -> None:
    """Write the config of the run into its folder, whole or not at all."""
    partial = workdir / "config.json.partial"
    partial.write_text(to_json(config))
    partial.replace(workdir / "config.json")


def _numbered(name: str):
    yield RUNS / name
    for number in count(2):
        yield RUNS / f"{name}-{number}"
