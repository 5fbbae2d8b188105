"""Compiled programs, kept in the cache folder so that a later process starts faster."""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax

from scconv_jax.files import cache_folder

MOST_BYTES = 2 << 30
"""Size of the folder above which the oldest programs are deleted."""
LEAST_FREE_BYTES = 256 << 20
"""Free space below which no programs are kept."""


def keep_programs() -> Path | None:
    """Keep compiled programs of JAX in the cache folder, and return their folder, or None if nothing is kept there.

    What the user has set takes precedence: `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=0`
    keeps none. JAX tells programs of its versions, settings and devices apart. Each kind of processor has its own folder, since
    programs for a CPU may use all its instructions. If the folder cannot be written or is full, a warning says so, once.
    """
    settings: Any = jax.config  # jax declares no types for its fields
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    folder = cache_folder() / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"writable")
        _delete_oldest(folder.parent)
        if (free := shutil.disk_usage(folder).free) < LEAST_FREE_BYTES:
            raise OSError(None, f"only {free >> 20} MB are free")
    except OSError as error:
        logging.getLogger("scconv_jax").warning(
            "Compiled programs are not kept in %s (%s), so every start compiles anew. SCCONV_JAX_CACHE names another folder.",
            folder,
            error.strerror,
        )
        return None
    # A damaged program is compiled anew, and one that cannot be written is compiled at the next start: no reason for a warning.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def _processor() -> str:
    """Return a name for the kind of CPU: its architecture and a hash of its instruction sets."""
    features = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _delete_oldest(folder: Path) -> None:
    """Delete the oldest programs until those in `folder` take at most `MOST_BYTES`."""
    found = []
    for path in folder.rglob("*-cache"):
        try:
            found.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:  # another process deletes too
            continue
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
