"""Reading and writing files of weights, whatever their format, which their first bytes tell.

No file can run code, whatever it holds: pickles are read by a machine of our own (`scconv_jax.weights.pickles`) that knows
the few names a state dict needs and nothing else. Every bad file ends in one `WeightsError`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from scconv_jax.interop.conversion import to_torch
from scconv_jax.weights import runs, safetensors_files, torch_files
from scconv_jax.weights.files import WeightsError, sha256, unknown
from scconv_jax.weights.state_dicts import Contents

Variables = dict[str, Any]

_LONGEST_NAME = 500  # characters; names are paths of a tree, which a deep one would have walked for ever

_log = logging.getLogger("scconv_jax")


class Source(NamedTuple):
    """What a file of weights holds. Exactly one of `tensors` and `variables` is given."""

    tensors: dict[str, np.ndarray] | None
    """A PyTorch state dict, name to array, out of the wrapper that it may have been in."""
    variables: Variables | None
    """Flax variables, `{"params": ..., "batch_stats": ...}`, NumPy arrays at the leaves."""
    metadata: dict[str, str]
    """What the file says of itself; `arguments` of `create_model` as JSON."""
    format: str
    """"torch zip", "torch legacy", "safetensors" or "orbax"."""
    path: Path
    sha256: str
    """Of the file, 64 hex digits; empty for a folder."""
    bytes: int
    """Size of the file, or of all files of a folder."""
    skipped: dict[str, str]
    """What a PyTorch checkpoint holds beside its weights, name to kind: `{"epoch": "int", "optimizer": "dict"}`."""
    not_finite: dict[str, int]
    """Entries or leaves with NaN or infinite values, and how many."""
    wrappers: tuple[str, ...] = ()
    """Keys that a state dict stood under in a PyTorch checkpoint, from the outside: `("state_dict",)`."""


class Loaded(NamedTuple):
    """Flax variables from a file, and what the file says of them."""

    variables: Variables
    metadata: dict[str, Any]


def read(path: str | os.PathLike[str]) -> Source:
    """Read a file of weights, told by its content: PyTorch (zip and legacy format), safetensors, or a run's Orbax checkpoint.

    Args:
        path: a file; or a run's folder (its best step is taken, else its latest), or one of its `checkpoints/STEP`.

    Returns:
        What the file holds.

    Raises:
        WeightsError: there is no such file, or it is damaged, hostile or of another kind; the message says which.
    """
    path = Path(path)
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except WeightsError as error:
        # What it quotes from the file may be long, or hold what a terminal would obey.
        reason = "".join(letter if letter.isprintable() else "?" for letter in str(error)[:600])
        raise WeightsError(f"{path} cannot be used: {reason}.") from error
    except MemoryError as error:
        raise WeightsError(f"{path} does not fit into this machine's memory.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error


def load(path: str | os.PathLike[str]) -> Loaded:
    """Read Flax variables from what `save` wrote or from a training run.

    Args:
        path: a `.safetensors` file in Flax's naming, a run's folder, or one of its `checkpoints/STEP`.

    Returns:
        `(variables, metadata)`: variables are NumPy arrays; metadata has, as far as the file gives them, `model` and
        `arguments` (so that `create_model(metadata["model"], **metadata["arguments"])` is the network), `source`,
        `source_sha256`, `version`. Values that are not finite are logged as a warning under `scconv_jax`, and kept.

    Raises:
        WeightsError: the file cannot be read, or has PyTorch's naming: convert it first.
    """
    source = read(path)
    if source.variables is None:
        raise WeightsError(
            f"{path} has PyTorch's names and layout. Convert it (`python -m scconv_jax convert {path} --out FILE.safetensors`), "
            "or give its entries to `scconv_jax.from_torch`."
        )
    metadata: dict[str, Any] = dict(source.metadata)
    if "arguments" in metadata:
        metadata["arguments"] = json.loads(metadata["arguments"])
    if source.not_finite:
        count = sum(source.not_finite.values())
        _log.warning("%s: %d values are NaN or infinite, in %s.", path, count, ", ".join(list(source.not_finite)[:3]))
    return Loaded(source.variables, metadata)


def save(path: str | os.PathLike[str], variables: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write variables to a file, which is there whole or not at all.

    Args:
        path: `.safetensors` for Flax's naming and layout (`params/layer1/0/conv1/kernel`), or `.pth` or `.pt` for a PyTorch
            state dict (`layer1.0.conv1.weight`), which PyTorch loads with `weights_only=True`.
        variables: `{"params": ..., "batch_stats": ...}`, JAX or NumPy arrays.
        metadata: kept in a `.safetensors` file: `model`, `arguments` and the like; what is no text is written as JSON. A
            PyTorch state dict has no place for it.

    Raises:
        WeightsError: another suffix, no variables, metadata that JSON has not, or a file that cannot be written.
    """
    path = Path(path)
    if "params" not in variables or not set(variables) <= set(runs.COLLECTIONS):
        raise WeightsError(
            f"Cannot write {path}: variables are {{'params': ..., 'batch_stats': ...}}, as `model.init` returns them; "
            f"got {', '.join(map(str, list(variables)[:5])) or 'none'}."
        )
    try:
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    except (TypeError, ValueError) as error:
        raise WeightsError(f"Cannot write {path}: its metadata must be texts, or what JSON has ({error}).") from error
    if path.suffix == ".safetensors":
        safetensors_files.write(path, traverse_util.flatten_dict(dict(variables), sep="/"), text)
    elif path.suffix in (".pth", ".pt"):
        torch_files.write_zip(path, to_torch(variables))
    else:
        raise WeightsError(f"Cannot tell a format from {path.name}: its name must end in .safetensors, .pth or .pt.")


def _read_file(path: Path) -> Source:
    if path.exists() and not path.is_file():
        raise WeightsError("it is neither a file nor a folder")
    with path.open("rb") as file:
        head = file.read(512)
    metadata: dict[str, str] = {}
    found: Contents | None = None
    if torch_files.is_legacy(head):
        kind, found = "torch legacy", torch_files.read_legacy(path)
        tensors = found.tensors
    elif head.startswith(b"PK"):
        kind, found = "torch zip", torch_files.read_zip(path)
        tensors = found.tensors
    elif head[8:9] == b"{" and not head.startswith(b"{"):
        kind, (tensors, metadata) = "safetensors", safetensors_files.read(path)
    else:
        raise WeightsError(unknown(head))
    if not tensors:
        raise WeightsError("it holds no arrays")
    if long := next((name for name in tensors if len(name) > _LONGEST_NAME), None):
        raise WeightsError(f"it has an entry with a name of {len(long):,} characters, {long[:50]!r} and so on")
    if unprintable := next((name for name in tensors if not name.isprintable()), None):
        raise WeightsError(f"it has an entry with a name that cannot be printed, {unprintable!r}")
    if not _is_plain(metadata.get("arguments", "{}")):
        raise WeightsError("the arguments in its metadata are no JSON object of numbers and printable texts")
    is_flax = all(name.startswith(tuple(f"{collection}/" for collection in runs.COLLECTIONS)) for name in tensors)
    return Source(
        tensors=None if is_flax else tensors,
        variables=_nested(tensors) if is_flax else None,
        metadata=metadata,
        format=kind,
        path=path,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        skipped={} if found is None else found.skipped,
        not_finite=_not_finite(tensors),
        wrappers=() if found is None else found.wrappers,
    )


def _is_plain(arguments: str) -> bool:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or not all(isinstance(value, (str, int, float, type(None))) for value in found.values()):
        return False
    return all(text.isprintable() for text in (*found, *found.values()) if isinstance(text, str))


def _nested(tensors: Mapping[str, np.ndarray]) -> Variables:
    """The tree of arrays whose names are paths, `params/conv1/kernel`."""
    paths = {tuple(name.split("/")): array for name, array in tensors.items()}
    for path in paths:
        if not all(path) or any(path[:length] in paths for length in range(1, len(path))):
            raise WeightsError(f"the path {'/'.join(path):.200} is empty somewhere, or leads through an array")
    return traverse_util.unflatten_dict(paths)


def _read_folder(path: Path) -> Source:
    variables, metadata, skipped, size = runs.read(path)
    leaves = traverse_util.flatten_dict(variables, sep="/")
    return Source(None, variables, metadata, "orbax", path, "", size, skipped, _not_finite(leaves))


def _not_finite(tensors: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, array in tensors.items():
        if array.dtype.kind not in "biu" and not (finite := np.isfinite(array)).all():
            counts[name] = int(finite.size - finite.sum())
    return counts
