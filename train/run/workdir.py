"""The folder of a run: its name, lock and config. No run is overwritten by mistake.

A folder holds a run if it holds `config.json`, which is written before any metrics or checkpoint.
"""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import NoReturn

from train.config import Config, ConfigError
from train.config.fields import suggest
from train.config.files import differences, from_json, to_json

RUNS = Path("runs")
LOCK = ".lock"
FIXED = (
    "model.name", "optim.freeze",
    "data.name", "data.batch_size", "data.synthetic_train", "data.synthetic_classes", "data.val_fraction",
)  # fmt: skip
"""Fields that cannot change within a run: the parameters and the meaning of a step depend on them."""


def holds_run(workdir: Path) -> bool:
    """Return whether a run has begun here. A run without its config counts too, so that it is not overwritten."""
    return (workdir / "config.json").is_file() or (workdir / "checkpoints").is_dir()


def fresh_workdir(name: str) -> Path:
    """Return the first of `runs/NAME`, `runs/NAME-2`, `runs/NAME-3`, … that holds no run."""
    return next(workdir for workdir in _numbered(name) if not holds_run(workdir))


def latest_workdir(name: str) -> Path:
    """Return the last of `runs/NAME`, `runs/NAME-2`, … that holds a run, or `runs/NAME` if none does."""
    return [RUNS / name, *takewhile(holds_run, _numbered(name))][-1]


def load_run(workdir: Path) -> Config:
    """Return the config of the run in `workdir`."""
    if not (workdir / "config.json").is_file():
        if holds_run(workdir):
            raise ConfigError(f"{workdir} holds checkpoints but no config.json: restore the file, or choose another --workdir")
        runs = [str(path.parent) for path in sorted(workdir.parent.glob("*/config.json"))]
        raise ConfigError(f"no run in {workdir}: it has no config.json{suggest(str(workdir), runs)}")
    return from_json((workdir / "config.json").read_bytes(), str(workdir / "config.json"))


def check_same_run(workdir: Path, old: Config, new: Config) -> list[str]:
    """Return what `new` changes in the run in `workdir`, one line per field."""
    changes = differences(old, new)
    names = (*FIXED, "seed") if new.data.val_fraction else FIXED  # another seed would train on test images
    fixed = [f"{name} {changes[name][0]!r}, not {changes[name][1]!r}" for name in names if name in changes]
    if fixed:
        raise ConfigError(
            f"{workdir} holds a run with {'; '.join(fixed)}: keep these values, or start a new run in another --workdir"
        )
    return [f"{name}: {before!r} → {after!r}" for name, (before, after) in changes.items()]


def refuse_existing_run(workdir: Path, new: Config) -> NoReturn:
    """Raise an error that `workdir` already holds a run, with the fields in which its config differs from `new`."""
    changes = [f"{name} {old!r}, not {new!r}" for name, (old, new) in differences(load_run(workdir), new).items()]
    with_ = f", with {'; '.join(changes)}" if changes else ""
    raise ConfigError(f"{workdir} already holds a run{with_}: add --resume to continue it, or choose another --workdir")


@contextmanager
def locked_folder(folder: Path | None, option: str = "--workdir") -> Iterator[None]:
    """Create the folder and lock it against other processes. Do nothing if it is None. `option` is where the user named it.

    The kernel releases the lock when this process ends, however it ends.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another {option}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or choose another {option}"
            ) from error
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {folder} cannot be locked ({error.strerror}): do not use it twice at a time", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class OpenFolder:
    """An existing folder, held open. On Linux it is found again after it was renamed."""

    def __init__(self, path: Path) -> None:
        self._given, self._descriptor = path, os.open(path, os.O_RDONLY)
        link = Path(f"/proc/self/fd/{self._descriptor}")
        self._link = link if link.exists() else None

    def path(self) -> Path:
        """Return the path as given, or the new one if the folder was renamed."""
        if self._link is None or (self._given.exists() and self._given.samefile(self._link)):
            return self._given
        return self._link.resolve()

    def plain(self) -> Path:
        """Return a path that does not depend on the folder's name; without Linux's /proc, the absolute path."""
        return self._link or self._given.resolve()

    def close(self) -> None:
        """Let go of the folder. `path` then returns the path as given."""
        self._given, self._link = self.path(), None
        os.close(self._descriptor)


def save_config(workdir: Path, config: Config) -> None:
    """Write the config of the run to its folder atomically."""
    import scconv_jax  # late: it imports jax, and this module is needed to print the help

    with scconv_jax.files.replacing(workdir / "config.json") as file:
        file.write_text(to_json(config))


def _numbered(name: str) -> Iterator[Path]:
    return (RUNS / (f"{name}-{number}" if number > 1 else name) for number in count(1))
