"""Safetensors files (https://github.com/huggingface/safetensors): a JSON header that names the arrays, then their bytes.

The safetensors library checks the header, whose arrays must cover the file without gap or overlap, and writes. The arrays
are read here, because the library has no bfloat16 for NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from scconv_jax.files import WeightsError, read_bytes, replacing

_LONGEST_HEADER = 16 << 20
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all arrays, by name, and the metadata.

    Raises:
        WeightsError: the header does not tell the truth, the file is cut off, or an array is of another dtype than NumPy's
            and bfloat16.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise WeightsError(f"its header claims {length:,} bytes: it is damaged, or no safetensors file")
        try:
            with safetensors.safe_open(path, "np"):
                header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (safetensors.SafetensorError, ValueError) as error:
            raise WeightsError(f"it is a damaged safetensors file ({error})") from error
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise WeightsError(f"{name} is of dtype {entry['dtype']}; those that can be read are {', '.join(_DTYPES)}")
            start, end = entry["data_offsets"]
            data = read_bytes(file, 8 + length + start, end - start)
            data = data != 0 if entry["dtype"] == "BOOL" else data.view(_DTYPES[entry["dtype"]])
            try:
                tensors[name] = data.reshape(entry["shape"])
            except ValueError as error:  # sizes or a number of axes beyond NumPy's
                raise WeightsError(f"{name} has the shape {entry['shape']!s:.200}, which cannot be") from error
    return tensors, metadata


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays by name, whole or not at all.

    Raises:
        WeightsError: the file cannot be written, or the format has no such dtype.
    """
    # Not contiguous, safetensors 0.8 writes another array's bytes without a word.
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            safetensors.numpy.save_file(arrays, temporary, dict(metadata))
        except safetensors.SafetensorError as error:
            raise WeightsError(f"Cannot write {path}: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise WeightsError("its header names an array twice")
    return result
