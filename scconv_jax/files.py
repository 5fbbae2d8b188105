"""Files that are written whole or not at all, paths as users give them, and the cache folder."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; when the block ends without an error, the new file replaces `path`.

    After an error, `path` is unchanged and no other file remains. On Linux this also holds for a killed process: the new file
    has no name until it is complete.

    Raises:
        OSError: The folder does not exist, cannot be written, or is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with contextlib.ExitStack() as stack:
            descriptor = _open_unnamed(path.parent)
            written = temporary if descriptor is None else Path(f"/proc/self/fd/{descriptor}")
            if descriptor is None:
                descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            stack.callback(os.close, descriptor)
            yield written
            os.fsync(descriptor)
            if written != temporary:
                folder = os.open(path.parent, os.O_RDONLY)
                stack.callback(os.close, folder)
                os.link(written, temporary.name, dst_dir_fd=folder)  # without dst_dir_fd, Python links the link in /proc
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of a file or folder that a user names, with `~` expanded.

    Raises:
        ValueError: `name` is an address, such as gs://bucket/run, or begins with the `~` of a user without a home folder.
    """
    text = os.fspath(name)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        address = text if "://" in text else text.replace(":/", "://", 1)  # `Path` makes one slash of two
        raise ValueError(
            f"{address} is an address, not a folder of this machine: mount what it names (gcsfuse, mount-s3), or copy it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: no home folder is known for {Path(text).parts[0]}; give the path in full") from error


def cache_folder() -> Path:
    """Return the folder for downloads and indices: `SCCONV_JAX_CACHE`, else `scconv_jax` in the user's cache folder.

    If it cannot be made, say so once and return a temporary folder, which is deleted when the process ends.
    """
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "scconv_jax")
    name = os.environ.get("SCCONV_JAX_CACHE") or default
    try:
        folder = local_path(name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        return _temporary_cache(name, f"{name}: {error.strerror}")
    except ValueError as error:
        return _temporary_cache(name, str(error))


@functools.cache
def _temporary_cache(name: str, reason: str) -> Path:
    logging.getLogger("scconv_jax").warning(
        "There is no cache folder (%s). Downloads and indices of folders are kept only until this process ends. "
        "Set SCCONV_JAX_CACHE to a folder for them.",
        reason,
    )
    try:
        folder = tempfile.mkdtemp(prefix="scconv_jax-")
    except OSError:  # nothing can be written anywhere, as whoever tries will say
        return Path(name)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _open_unnamed(folder: Path) -> int | None:
    """Open a file without a name, if the system and the file system support it."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").exists():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:
        return None
