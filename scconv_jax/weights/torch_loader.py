"""A second opinion on PyTorch's files: where PyTorch is installed, its own `weights_only` loader must read the same.

It is asked last, when our reader has passed the whole file, and only of files that hold nothing but tensors and plain data. What
else a file may hold that loader makes, where ours passes over it: a set of tuples within tuples is a few bytes, and takes it
for ever to hash.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.state_dicts import Contents, unwrapped

SAFE = (2, 10)
"""The first PyTorch whose loader is known to run no code (CVE-2025-32434) and to keep to its memory (CVE-2026-24747)."""


def confirm(path: Path, found: Contents, *, is_zip: bool) -> str:
    """Read a file by PyTorch, and compare.

    Args:
        path: a file in one of PyTorch's formats.
        found: what our reader made of it.
        is_zip: whether it is of the zip format, which is mapped into memory: then what is not compared is not read.

    Returns:
        What PyTorch said, for people: that it reads the same, or why it was not asked, or what it refused.

    Raises:
        WeightsError: PyTorch reads other entries, shapes, dtypes or bits.
    """
    if not found.plain:
        return "not asked, for there are other objects than tensors"
    try:
        import torch
    except (ImportError, OSError):  # none, or a broken one
        return "not installed"
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or tuple(map(int, version.groups())) < SAFE:
        return f"not asked, for {torch.__version__} is not safe: 2.10 or later is"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever its many layers raise
        return f"{torch.__version__} refuses it, with {type(error).__name__}"
    theirs = unwrapped(value)[0]
    for name, ours in found.tensors.items():
        if not _same(ours, theirs.get(name)):
            raise WeightsError(
                f"PyTorch {torch.__version__} reads {name} otherwise than we do: the file is made to look different to "
                "different readers, or one of them is wrong. Do not use it"
            )
    return f"{torch.__version__} reads the same"


def _same(ours: np.ndarray, tensor: Any) -> bool:
    """Whether a tensor of PyTorch has the shape, dtype and bits of an array."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != ours.shape:
        return False
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        theirs = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    elif tensor.dtype == torch.bool:
        theirs = tensor.view(torch.uint8).numpy() != 0  # a file may have other bytes than 0 and 1
    else:
        theirs = tensor.numpy()
    bits = f"u{ours.itemsize}"  # two values that are no number are equal only so
    return theirs.dtype == ours.dtype and np.array_equal(theirs.view(bits), ours.view(bits))
