"""Reads and writes PyTorch's files of tensors without PyTorch.

Two formats hold the same pickle of a state dict, in which each tensor is a view (offset, sizes, strides) of a storage:

    zip, since 1.6      an uncompressed archive: ROOT/data.pkl, ROOT/byteorder, and each storage as ROOT/data/KEY
    legacy, before      five pickles (magic number, version, machine, the state dict, keys of the storages), then each
                        storage as its length (int64) and its elements

Reference: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py. A restricted unpickler
(`scconv_jax.weights.pickles`) reads the pickles. Every size in a file is checked against the file before it is used.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scconv_jax.weights.files import Contents, WeightsError, read_bytes, replacing
from scconv_jax.weights.pickles import MAX_BYTES
from scconv_jax.weights.state_dicts import Storage, extract, read_pickle, write_pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MAX_ENTRIES = 100_000


def is_legacy(head: bytes) -> bool:
    """Return whether a file with these first bytes has the legacy format: a pickle, of any protocol, of its magic number."""
    return head.startswith(b"\x80") and _LEGACY_MAGIC.to_bytes(10, "little") in head[:40]


def read_zip(path: Path, key: str = "") -> Contents:
    """Read a file of PyTorch 1.6 or later; `key` chooses one of several sets of weights."""
    with _BoundedFile(io.FileIO(path)) as file:
        entries = _read_archive(file)
        if entries["data.pkl"].size > MAX_BYTES:
            raise WeightsError(f"its pickle has {entries['data.pkl'].size:,} bytes; a state dict needs fewer than {MAX_BYTES:,}")
        order = entries["byteorder"].read(file).tobytes() if "byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise WeightsError(f"its byte order is {order[:20]!r}, neither little nor big")
        pickled = read_pickle(entries["data.pkl"].read(file).tobytes())
        for storage in pickled.storages.values():
            entry = entries.get(f"data/{storage.key}")
            if entry is None:
                raise WeightsError(f"storage {storage.key} is not in its archive")
            if entry.size < storage.bytes:
                raise WeightsError(f"storage {storage.key} has {entry.size:,} bytes, but needs {storage.bytes:,}")

        def load(storage: Storage) -> np.ndarray:
            elements = _elements(entries[f"data/{storage.key}"].read(file), storage)
            return elements if order.decode() == sys.byteorder else elements.byteswap()

        return extract(pickled, load, path.stat().st_size, key)


def read_legacy(path: Path, key: str = "") -> Contents:
    """Read a file of PyTorch 0.4 to 1.5, or written with `_use_new_zipfile_serialization=False`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2 * MAX_BYTES)
        magic = read_pickle(head)
        if magic.value != _LEGACY_MAGIC:
            raise WeightsError("it does not begin with the magic number of PyTorch's files")
        version = read_pickle(head, magic.end)
        machine = read_pickle(head, version.end)
        if version.value != _LEGACY_VERSION or not isinstance(machine.value, dict):
            raise WeightsError(f"it does not have version {_LEGACY_VERSION} of PyTorch's legacy format, the only known one")
        if machine.value.get("little_endian") is not True:
            raise WeightsError("it was written on a big-endian machine; save it again there with PyTorch 1.6 or later")
        pickled = read_pickle(head, machine.end)
        keys = read_pickle(head, pickled.end)
        # Only lists of strings are compared: other values could be so deep that comparing them would recurse.
        stored = keys.value if isinstance(keys.value, list) and all(isinstance(key, str) for key in keys.value) else []
        if sorted(stored) != sorted(pickled.storages):
            raise WeightsError("its list of storages differs from the storages of its tensors")
        offset = keys.end
        offsets: dict[str, int] = {}
        for name in stored:
            storage = pickled.storages[name]
            file.seek(offset)
            if file.read(8) != struct.pack("<q", storage.length):
                raise WeightsError(f"storage {name} is cut off, or its length is not the one in the pickle")
            offsets[name] = offset + 8
            offset += 8 + storage.bytes
            if offset > size:
                raise WeightsError(f"it is cut off: storage {name} ends at byte {offset:,} of {size:,}")

        def load(storage: Storage) -> np.ndarray:
            return _elements(read_bytes(file, offsets[storage.key], storage.bytes), storage)

        return extract(pickled, load, size, key)


def write_zip(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a state dict in PyTorch's zip format, whole or not at all; PyTorch loads it with `weights_only=True`."""
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
    with replacing(path) as written, zipfile.ZipFile(written, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), write_pickle(arrays))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        for number, array in enumerate(arrays.values()):
            info = zipfile.ZipInfo(f"archive/data/{number}")
            # Storages start at multiples of 64 bytes, so that PyTorch can map the file into memory.
            padding = -(archive.start_dir + 34 + len(info.filename)) % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            archive.writestr(info, array.reshape(-1).view(np.uint8).data)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


class _BoundedFile(io.BufferedReader):
    """A file that refuses to read more at once than the directory of an honest archive needs."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_BYTES:
            raise WeightsError(f"its archive has a directory of {size:,} bytes")
        return super().read(size)


class _Entry(NamedTuple):
    """Name, position and checksum of an entry of an archive."""

    name: str
    offset: int
    size: int
    crc: int

    def read(self, file: io.BufferedReader) -> np.ndarray:
        data = read_bytes(file, self.offset, self.size)
        if self.crc and zlib.crc32(data.data) != self.crc:  # PyTorch can leave checksums out; they are 0 then
            raise WeightsError(f"entry {self.name} of its archive is damaged: its checksum differs. Download it again")
        return data


def _read_archive(file: io.BufferedReader) -> dict[str, _Entry]:
    """Return the entries of PyTorch's archive, by name without their common folder.

    Anything that Python's zipfile and PyTorch's miniz could read differently is an error.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise WeightsError(f"its archive is cut off or damaged ({error}). Download or save it again") from error
    if archive.start_dir != _directory_offset(file):
        raise WeightsError(
            "its archive has no directory at the stated offset, so that different programs would read different files"
        )
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = [info.orig_filename for info in infos]
    root = next((name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if root is None or f"{root}/constants.pkl" in names:
        raise WeightsError(_describe_archive(names))
    if len(infos) > _MAX_ENTRIES:
        raise WeightsError(f"its archive has {len(infos):,} entries")
    entries: dict[str, _Entry] = {}
    seen: set[str] = set()
    end = 0
    for info, name in zip(infos, names, strict=True):
        is_folder = name.endswith("/") and info.file_size == 0  # added by zip programs, not by PyTorch
        parts = name.removesuffix("/" if is_folder else "").split("/")
        if parts[0] != root or not all(parts) or ".." in parts or "\\" in name or "\0" in name:
            raise WeightsError(f"its archive has an entry {name!r}, outside its folder {root}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise WeightsError(f"entry {name} of its archive is compressed or encrypted, which PyTorch never does")
        if info.header_offset < end:
            raise WeightsError(f"entry {name} of its archive lies before it or overlaps another")
        offset = _data_offset(file, info)
        end = offset + info.file_size
        if end > archive.start_dir:
            raise WeightsError(f"entry {name} ends beyond the archive")
        if is_folder:
            continue
        inner = name.removeprefix(f"{root}/")
        if inner.casefold() in seen:  # PyTorch ignores case here
            raise WeightsError(f"entry {name} occurs twice in its archive")
        seen.add(inner.casefold())
        entries[inner] = _Entry(name, offset, info.file_size, info.CRC)
    return entries


def _directory_offset(file: io.BufferedReader) -> int:
    """Return the directory's offset from the archive's last record, or -1 if the directory does not end at that record.

    Python looks for the directory before the record, PyTorch at the stated offset.
    """
    size = file.seek(0, io.SEEK_END)
    last = max(0, size - 22 - 0xFFFF)
    file.seek(last)
    tail = file.read(22 + 0xFFFF)
    at = len(tail) - 22 if tail[-22:].startswith(b"PK\5\6") and tail.endswith(b"\0\0") else tail.rfind(b"PK\5\6")
    if not 0 <= at <= len(tail) - 22:
        return -1
    short = length, start = struct.unpack_from("<II", tail, at + 12)
    end = last + at
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7"):  # zip64: a record of 56 bytes with 64-bit numbers comes before
        end -= 20 + 56
        record = tail[max(0, end - last) :][:56]
        (place,) = struct.unpack_from("<Q", tail, at - 12)
        if place != end or end < last or not record.startswith(b"PK\6\6" + struct.pack("<Q", 44)):
            return -1
        length, start = struct.unpack_from("<QQ", record, 40)
        if short[0] not in (length, 0xFFFFFFFF) or short[1] not in (start, 0xFFFFFFFF):
            return -1
    return start if start + length == end else -1


def _data_offset(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's data after its local header. The header must agree with the directory."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise WeightsError(f"entry {info.orig_filename} of its archive is damaged")
    method, name_length, extra_length = struct.unpack("<8xH16xHH", header)
    name = file.read(name_length)
    if method != zipfile.ZIP_STORED or name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise WeightsError(f"entry {info.orig_filename} of its archive has another name or compression in its own header")
    return info.header_offset + 30 + name_length + extra_length


def _describe_archive(names: list[str]) -> str:
    """Describe an archive without a state dict, and say what to do."""
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "it is a TorchScript archive, which holds code. Take its weights out in PyTorch: "
            "`torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')`"
        )
    if any(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays (.npz). Give them to `scconv_jax.from_torch` as a dict"
    if "model.weights.h5" in names or "config.json" in names:
        return "it is a Keras model. PyTorch files, safetensors and the folders of training runs can be read"
    return "it is a zip archive, but not of PyTorch. Unpack it and give the file of weights inside"


def _elements(data: np.ndarray, storage: Storage) -> np.ndarray:
    data = data[: storage.bytes]
    return data != 0 if storage.dtype == np.bool_ else data.view(storage.dtype)
