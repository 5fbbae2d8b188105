"""Reads a file of weights in any supported format; its first bytes identify the format.

No file can run code: a restricted unpickler (`scconv_jax.weights.pickles`) admits only the few names that a state dict needs.
Every bad file raises a `WeightsError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from scconv_jax.weights import runs, safetensors_files, torch_files
from scconv_jax.weights.files import WeightsError, describe_unknown

_MAX_KEY_LENGTH = 500  # characters; a key may be a path in a tree, and a very deep tree takes too long to walk


class Source(NamedTuple):
    """Contents of a file of weights."""

    tensors: dict[str, np.ndarray]  # a PyTorch state dict without its wrapper, or Flax variables (`params/conv1/kernel`)
    is_flax: bool  # whether the keys are paths of Flax variables
    metadata: dict[str, str]  # from the file; `arguments` are the options of `create_model` as JSON
    format: str  # "torch zip", "torch legacy", "safetensors" or "orbax"
    path: Path
    bytes: int  # size of the file, or of all files in a folder
    skipped: dict[str, str]  # other items of a checkpoint, name to type: `{"epoch": "int", "optimizer": "dict"}`
    not_finite: dict[str, int]  # keys of arrays with NaN or infinite values, and how many they have

    @property
    def variables(self) -> dict[str, Any]:
        """The arrays as Flax variables, if the keys are paths."""
        return traverse_util.unflatten_dict(self.tensors, sep="/")


def read(path: str | os.PathLike[str]) -> Source:
    """Read a file of weights (PyTorch's zip or legacy format, safetensors), a run's folder or one of its `checkpoints/STEP`."""
    path = Path(path)
    try:
        if path.is_dir():
            variables, metadata, skipped, size = runs.read(path)
            tensors: dict[str, Any] = dict(traverse_util.flatten_dict(variables, sep="/"))
            return Source(tensors, True, metadata, "orbax", path, size, skipped, _count_not_finite(tensors))
        return _read_file(path)
    except WeightsError as error:
        # Quoted parts of the file may be long or contain control sequences of a terminal.
        reason = "".join(letter if letter.isprintable() else "?" for letter in str(error)[:600])
        raise WeightsError(f"{path} cannot be used: {reason}.") from error
    except MemoryError as error:
        raise WeightsError(f"{path} does not fit into this machine's memory.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_file(path: Path) -> Source:
    if path.exists() and not path.is_file():
        raise WeightsError("it is neither a file nor a folder")
    with path.open("rb") as file:
        head = file.read(512)
    metadata, skipped = {}, {}
    if torch_files.is_legacy(head):
        kind, (tensors, skipped) = "torch legacy", torch_files.read_legacy(path)
    elif head.startswith(b"PK"):
        kind, (tensors, skipped) = "torch zip", torch_files.read_zip(path)
    elif head[8:9] == b"{" and not head.startswith(b"{"):
        kind, (tensors, metadata) = "safetensors", safetensors_files.read(path)
    else:
        raise WeightsError(describe_unknown(head))
    is_flax = _check_keys(tensors)
    if not _is_plain(metadata.get("arguments", "{}")):
        raise WeightsError("the arguments in its metadata are not a JSON object of numbers and printable strings")
    return Source(tensors, is_flax, metadata, kind, path, path.stat().st_size, skipped, _count_not_finite(tensors))


def _check_keys(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether the keys are paths of Flax variables; refuse keys that cannot be printed or used."""
    if not tensors:
        raise WeightsError("it holds no arrays")
    if long := next((key for key in tensors if len(key) > _MAX_KEY_LENGTH), None):
        raise WeightsError(f"it has a key of {len(long):,} characters, which begins with {long[:50]!r}")
    if unprintable := next((key for key in tensors if not key.isprintable()), None):
        raise WeightsError(f"it has a key that cannot be printed, {unprintable!r}")
    if not all(key.startswith(runs.PREFIXES) for key in tensors):
        return False
    for key in tensors:
        parts = key.split("/")
        if not all(parts) or any("/".join(parts[:length]) in tensors for length in range(1, len(parts))):
            raise WeightsError(f"the path {key:.200} has an empty part, or leads through an array")
    return True


def _is_plain(arguments: str) -> bool:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or not all(isinstance(value, (str, int, float, type(None))) for value in found.values()):
        return False
    return all(text.isprintable() for text in (*found, *found.values()) if isinstance(text, str))


def _count_not_finite(tensors: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key, array in tensors.items():
        if array.dtype.kind not in "biu" and not (finite := np.isfinite(array)).all():
            counts[key] = int(finite.size - finite.sum())
    return counts
