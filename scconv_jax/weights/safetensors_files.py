"""Safetensors files (https://github.com/huggingface/safetensors): a JSON header that names the arrays, then their bytes.

The safetensors library checks the header of a file that is read: the arrays must cover the file without gap or overlap. The
arrays are read and written here. For NumPy, the library (0.8) has no bfloat16, writes arrays that are not contiguous wrongly
without an error, and leaves a partial file if the process is killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from scconv_jax.weights.files import Contents, WeightsError, read_bytes, replacing

_MAX_HEADER = 16 << 20
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


def read(path: Path) -> Contents:
    """Read all arrays. Those of a dtype that NumPy lacks are skipped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise WeightsError(f"its header claims {length:,} bytes: it is damaged, or not a safetensors file")
        try:
            with safetensors.safe_open(path, "np"):
                header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (safetensors.SafetensorError, ValueError) as error:
            raise WeightsError(f"it is a damaged safetensors file ({error})") from error
        metadata = header.pop("__metadata__", None) or {}
        tensors: dict[str, np.ndarray] = {}
        skipped: dict[str, str] = {}
        for key, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                skipped[key] = f"a tensor of dtype {entry['dtype']}"
                continue
            start, end = entry["data_offsets"]
            data = read_bytes(file, 8 + length + start, end - start)
            data = data != 0 if entry["dtype"] == "BOOL" else data.view(_DTYPES[entry["dtype"]])
            try:
                tensors[key] = data.reshape(entry["shape"])
            except ValueError as error:  # sizes or a number of axes beyond NumPy's
                raise WeightsError(f"{key} has the impossible shape {entry['shape']!s:.200}") from error
    return Contents(tensors, skipped, metadata)


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays by key, whole or not at all."""
    arrays = {key: np.ascontiguousarray(value).reshape(np.shape(value)) for key, value in tensors.items()}
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Largest elements first, as the library does, so that each array starts at a multiple of its element size.
    order = sorted(arrays, key=lambda key: (-arrays[key].itemsize, key))
    offset = 0
    for key in order:
        array = arrays[key]
        if array.dtype not in names:
            raise WeightsError(
                f"Cannot write {path}: {key} has dtype {array.dtype}; the format has {', '.join(map(str, names))}."
            )
        header[key] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as written, written.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key in order:
            file.write(arrays[key].reshape(-1).view(np.uint8).data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise WeightsError("its header names an array twice")
    return result
