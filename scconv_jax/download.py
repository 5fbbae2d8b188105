"""Weights by name or address: published checkpoints, downloaded once into a cache."""

from __future__ import annotations

import os
from pathlib import Path

PUBLISHED = {
    "scnet50": "https://backseason.oss-cn-beijing.aliyuncs.com/scnet/scnet50-dc6a7e87.pth",
    "scnet101": "https://backseason.oss-cn-beijing.aliyuncs.com/scnet/scnet101-44c5b751.pth",
    "scnet50_v1d": "https://backseason.oss-cn-beijing.aliyuncs.com/scnet/scnet50_v1d-4109d1e1.pth",
}
"""Checkpoints by the name of their network; the eight hex digits are the start of the file's SHA-256."""


def fetch(source: str, *, cache: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Download weights, unless they are in the cache already.

    Args:
        source: a name of `PUBLISHED`, or an http or https address.
        cache: folder for the files; by default `SCCONV_JAX_CACHE`, else `scconv_jax` in the user's cache folder.
        progress: show a progress bar, where standard error is a terminal.

    Returns:
        The file on this machine. Where its name ends in eight hex digits (`scnet50-dc6a7e87.pth`), its SHA-256 begins
        with them.

    Raises:
        WeightsError: no such name or address, an interrupted transfer, or a file with another hash.
    """
    raise NotImplementedError
