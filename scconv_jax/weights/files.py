"""Shared by all readers and writers of weights: error class, atomic writes, hashes, descriptions of unknown files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scconv_jax import files


class WeightsError(ValueError):
    """A file or address of weights cannot be used; the message says what was found and what to do."""


class Contents(NamedTuple):
    """What a reader found in a file."""

    tensors: dict[str, np.ndarray]
    skipped: dict[str, str]  # other items, name to type
    metadata: dict[str, str] = {}  # noqa: RUF012 (never changed)
    key: str = ""  # where the tensors are, in a checkpoint of several dictionaries
    others: tuple[str, ...] = ()  # keys of other sets of weights


def check_writable(path: Path) -> None:
    """Raise a `WeightsError` if a file cannot be written to `path`: no such folder, no permission, an invalid name."""
    if os.path.isdir(path):
        raise WeightsError(f"{path} is a folder; give the name of a file to write.")
    if not os.path.isdir(path.parent):
        raise WeightsError(f"There is no folder {path.parent} to write {path.name} in; make it first.")
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
    except OSError as error:
        raise WeightsError(f"Cannot write {path}: {error.strerror or error}.") from error
    if not os.access(path.parent, os.W_OK):
        raise WeightsError(f"Cannot write {path}: no permission to write in its folder.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, as `scconv_jax.files.replacing` does; an `OSError` becomes a `WeightsError`."""
    check_writable(Path(path))
    try:
        with files.replacing(path) as written:
            yield written
    except OSError as error:
        raise WeightsError(f"Cannot write {path}: {error.strerror or error}.") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(file: io.BufferedReader, offset: int, count: int) -> np.ndarray:
    """Return bytes of a file, uint8 (count,). The caller checks that the file is long enough: memory is allocated first."""
    data = np.empty(count, np.uint8)
    file.seek(offset)
    if file.readinto(data.data) != count:
        raise WeightsError("it is cut off")
    return data


_OTHER_FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them"),
    (b"\x93NUMPY", "a single NumPy array"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    (b"{", "a JSON file, not weights"),
    (b"\x80", "a Python pickle that PyTorch did not write; it was not opened because it could run code"),
    (b"\x08", "a protocol buffer, perhaps of ONNX or TensorFlow"),
)


def describe_unknown(head: bytes) -> str:
    """Describe an unknown file from its first 512 bytes, and name the formats that can be read."""
    text = head.lstrip().lower()
    if not head:
        kind = "empty"
    elif not head.strip(b"\0"):
        kind = "nothing but zeros, an unfinished download"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "a web page, perhaps the error message of a server; download it again"
    elif head[257:262] == b"ustar":
        kind = "a tar archive; unpack it or, if PyTorch before 0.1.10 wrote it, save it again with a later version"
    else:
        kind = next((kind for start, kind in _OTHER_FORMATS if head.startswith(start)), "in an unknown format")
    return f"it is {kind}. PyTorch's .pth and .pt, .safetensors and the folders of training runs can be read"
