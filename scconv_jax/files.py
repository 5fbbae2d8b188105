"""Files that are written whole or not at all, and the cache folder."""

from __future__ import annotations

import contextlib
import os
import secrets
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


def cache_folder() -> Path:
    """Return the folder for downloads and indices: `SCCONV_JAX_CACHE`, else `scconv_jax` in the user's cache folder."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "scconv_jax")
    return Path(os.environ.get("SCCONV_JAX_CACHE") or default).expanduser()


def _open_unnamed(folder: Path) -> int | None:
    """Open a file without a name, if the system and the file system support it."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").exists():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:
        return None
