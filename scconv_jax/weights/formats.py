"""Reads a file of weights in any supported format; its first bytes identify the format.

No file can run code: a restricted unpickler (`scconv_jax.weights.pickles`) knows only the few functions that a state dict needs.
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

from scconv_jax.messages import listed, printable
from scconv_jax.weights import hub, runs, safetensors_files, torch_files
from scconv_jax.weights.files import Contents, WeightsError, describe_unknown
from scconv_jax.weights.selection import select

_MAX_ITEMS = 64  # options in the metadata, and values in an option that is a list
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
    key: str = ""  # where the tensors are in a file of several dictionaries
    others: tuple[str, ...] = ()  # keys of the other sets of weights in the file

    @property
    def variables(self) -> dict[str, Any]:
        """The arrays as Flax variables, if the keys are paths."""
        return traverse_util.unflatten_dict(self.tensors, sep="/")


def read(path: str | os.PathLike[str], key: str = "", checkpoint: str | int = "best") -> Source:
    """Read weights.

    Args:
        path: A file (PyTorch's zip or legacy format, safetensors), the index of a model in several files, a folder of the
            Hugging Face hub, a run's folder or one of its `checkpoints/STEP`.
        key: Which set of weights to take from a file that has several (`state_dict_ema`), or the prefix of their keys. If
            empty, the rules of `scconv_jax.weights.selection` choose.
        checkpoint: Which checkpoint of a run's folder to take: "best", "latest" or a step; see `runs.choose_step`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = None if (path / "checkpoints").is_dir() else hub.find(path)
            if found is None:
                return _read_run(path, key, checkpoint)
            return _read_file(found, key, checkpoint)
        return _read_file(path, key, checkpoint)
    except WeightsError as error:
        # Quoted parts of the file may be long or contain control sequences of a terminal.
        reason = printable(str(error)[:600])
        raise type(error)(f"{path} cannot be used: {reason}.") from error
    except MemoryError as error:
        raise WeightsError(f"{path} does not fit into this machine's memory.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_run(path: Path, key: str, checkpoint: str | int) -> Source:
    variables, metadata, skipped, size = runs.read(path, key, checkpoint)
    _check_arguments(metadata)
    tensors: dict[str, Any] = dict(traverse_util.flatten_dict(variables, sep="/"))
    return Source(tensors, True, metadata, "orbax", path, size, skipped, _count_not_finite(tensors))


def _read_file(path: Path, key: str, checkpoint: str | int) -> Source:
    if path.exists() and not path.is_file():
        raise WeightsError("it is neither a file nor a folder")
    if path.exists() and checkpoint != "best":
        raise WeightsError(f"it is not the folder of a training run, so there is no checkpoint {checkpoint!r} to choose")
    if path.name.endswith(hub.INDEX):
        kind, size, contents = _read_shards(path)
    else:
        hub.check_whole(path)
        size, (kind, contents) = path.stat().st_size, _read_format(path, key)
    if key and key != contents.key and (selected := select(contents.tensors, key)):
        skipped = contents.skipped | dict.fromkeys(selected.skipped, "an array")
        contents = contents._replace(tensors=selected.entries, skipped=skipped, key=key)
    is_flax = _check_keys(contents.tensors, contents.skipped)
    _check_arguments(contents.metadata)
    not_finite = _count_not_finite(contents.tensors)
    tensors, skipped, metadata, key, others = contents
    return Source(tensors, is_flax, metadata, kind, path, size, skipped, not_finite, key, others)


def _read_shards(index: Path) -> tuple[str, int, Contents]:
    """Read all shards that an index names; each must hold exactly the tensors that it is said to hold."""
    result, kinds, size = Contents({}, {}), set(), 0
    shards = hub.read_index(index)
    for path, keys in shards.items():
        try:
            kind, contents = _read_format(path, "")
        except WeightsError as error:
            raise WeightsError(f"its shard {path.name} is bad: {error}") from error
        found = contents.tensors.keys() | contents.skipped.keys()
        if found != keys:
            raise WeightsError(
                f"its shard {path.name} does not hold what it says: {listed(sorted(found ^ keys), 3)} "
                f"{'is' if len(found ^ keys) == 1 else 'are'} in one of them only. Download both again"
            )
        result.tensors.update(contents.tensors)
        result.skipped.update(contents.skipped)
        kinds.add(kind)
        size += path.stat().st_size
    return f"{', '.join(sorted(kinds))} in {len(shards)} shards", size, result


def _read_format(path: Path, key: str) -> tuple[str, Contents]:
    with path.open("rb") as file:
        head = file.read(512)
    if torch_files.is_legacy(head):
        return "torch legacy", torch_files.read_legacy(path, key)
    if head.startswith(b"PK"):
        return "torch zip", torch_files.read_zip(path, key)
    if head[8:9] == b"{" and not head.startswith(b"{"):
        return "safetensors", safetensors_files.read(path)
    raise WeightsError(describe_unknown(head))


def _check_keys(tensors: Mapping[str, np.ndarray], skipped: Mapping[str, str]) -> bool:
    """Return whether the keys are paths of Flax variables; refuse keys that cannot be printed or used."""
    if not tensors:
        others = listed([f"{key} ({kind})" for key, kind in skipped.items()], 5)
        raise WeightsError(f"it holds no arrays that can be converted{others and ', but '}{others}")
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


def _check_arguments(metadata: Mapping[str, str]) -> None:
    if not _is_plain(metadata.get("arguments", "{}")):
        raise WeightsError(
            "the arguments in its metadata are not a JSON object of numbers, printable strings and short lists of them"
        )


def _is_plain(arguments: str) -> bool:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    values = [list(found)]  # each option, planes=[16, 32, 64] say, as a list
    values += [value if isinstance(value, list) else [value] for value in found.values()]
    return all(
        len(items) <= _MAX_ITEMS
        and all(isinstance(item, (int, float, type(None))) or (isinstance(item, str) and item.isprintable()) for item in items)
        for items in values
    )


def _count_not_finite(tensors: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key, array in tensors.items():
        if array.dtype.kind not in "biu" and not (finite := np.isfinite(array)).all():
            counts[key] = int(finite.size - finite.sum())
    return counts
