"""Folders of the Hugging Face hub, and models in several files (shards) with an index.

model.safetensors, or pytorch_model.bin                     the whole model, beside config.json
model-00001-of-00002.safetensors, ...                       its shards
model.safetensors.index.json                                {"weight_map": {"conv1.weight": "model-00001-of-00002.safetensors"}}
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from scconv_jax.messages import listed
from scconv_jax.weights.files import WeightsError

INDEX = ".index.json"
_NAMES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_MAX_INDEX = 64 << 20  # bytes
_MAX_SHARDS = 10_000


def find(folder: Path) -> Path | None:
    """Return the file of weights or the index in a folder; None if there is none.

    Raises:
        WeightsError: There are several files, or shards without an index.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.name.endswith((*_SUFFIXES, INDEX)) and path.is_file()}
    for name in (wanted for model in _NAMES for wanted in (model + INDEX, model)):
        if name in files:
            return files[name]
    if shards := [name for name in files if _shard(name)]:
        raise WeightsError(
            f"it has shards of a model, such as {shards[0]}, but not their index; download {_index_of(shards[0])} too"
        )
    if len(files) > 1:
        raise WeightsError(f"it has several files of weights: {listed(list(files))}. Give one of them")
    return next(iter(files.values()), None)


def check_whole(path: Path) -> None:
    """Raise a `WeightsError` if a file is one of several shards."""
    if found := _shard(path.name):
        raise WeightsError(f"it is shard {int(found[2])} of {int(found[3])} of a model. Give the index, {_index_of(path.name)}")


def read_index(path: Path) -> dict[Path, set[str]]:
    """Return the shards that an index names, each with the keys of its tensors."""
    if path.stat().st_size > _MAX_INDEX:
        raise WeightsError(f"it is no index of a model: it has {path.stat().st_size:,} bytes")
    shards: dict[str, set[str]] = {}
    try:
        for key, name in json.loads(path.read_bytes())["weight_map"].items():
            shards.setdefault(name, set()).add(key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError('it is no index of a model: {"weight_map": {KEY: FILE, ...}} is expected') from error
    if outside := [name for name in shards if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]:
        raise WeightsError(f"it names {outside[0]!r:.200}, which is not a file in its folder")
    if len(shards) > _MAX_SHARDS:
        raise WeightsError(f"it names {len(shards):,} shards")
    if missing := [name for name in shards if not (path.parent / name).is_file()]:
        raise WeightsError(
            f"{len(missing)} of its {len(shards)} shards are not in the folder: {listed(missing, 5)}. Download them"
        )
    return {path.parent / name: keys for name, keys in shards.items()}


def _shard(name: str) -> re.Match[str] | None:
    found = re.fullmatch(r"(.+)-(\d+)-of-(\d+)(\.\w+)", name)
    return found if found and int(found[3]) > 1 else None


def _index_of(shard: str) -> str:
    found = _shard(shard)
    return f"{found[1]}{found[4]}{INDEX}" if found else ""
