"""What every reader and writer of weights needs: the one error, atomic writes, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class WeightsError(ValueError):
    """A file or address of weights cannot be used; the message says what was found and what to do."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file in the folder of `path`, which takes the place of `path` when it has been written whole.

    Whatever happens before leaves `path` as it was, and no other file.

    Raises:
        WeightsError: the folder does not exist, cannot be written, or is full.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the name of a file to write.")
    if not path.parent.is_dir():
        raise WeightsError(f"There is no folder {path.parent} to write {path.name} in; make it first.")
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are their owner's alone
        temporary.replace(path)
    except OSError as error:
        raise WeightsError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
