"""PyTorch's files of tensors, read and written without PyTorch.

Two formats hold the same pickle of a state dict, in which each tensor is a view (offset, sizes, strides) of a storage:

    zip, since 1.6      an archive, not compressed: ROOT/data.pkl, ROOT/byteorder, and each storage as ROOT/data/KEY
    legacy, before      five pickles (magic number, version, machine, the state dict, keys of the storages), then each
                        storage as its length (int64) and its elements

after https://github.com/pytorch/pytorch/blob/main/torch/serialization.py. The pickle is read by `scconv_jax.weights.pickles`:
what is no plain data and no tensor is refused by name, and nothing that a file says of sizes is believed before it is
checked against the file.
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

from scconv_jax.weights.files import WeightsError, read_bytes, replacing
from scconv_jax.weights.pickles import MOST_BYTES
from scconv_jax.weights.state_dicts import Contents, Storage, contents, read_pickle, write_pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MOST_ENTRIES = 100_000


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so is of the legacy format: a pickle, of whatever protocol, of its number."""
    return head.startswith(b"\x80") and _LEGACY_MAGIC.to_bytes(10, "little") in head[:40]


def read_zip(path: Path) -> Contents:
    """Read a file of PyTorch 1.6 or later.

    Raises:
        WeightsError: the file is damaged or hostile, or holds something other than tensors and plain data.
    """
    with _BoundedFile(io.FileIO(path)) as file:
        entries = _entries(file)
        if entries["data.pkl"].size > MOST_BYTES:
            raise WeightsError(f"its pickle has {entries['data.pkl'].size:,} bytes; a state dict needs less than {MOST_BYTES:,}")
        order = entries["byteorder"].read(file).tobytes() if "byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise WeightsError(f"its byte order is {order[:20]!r}, neither little nor big")
        pickled = read_pickle(entries["data.pkl"].read(file).tobytes())
        for storage in pickled.storages.values():
            entry = entries.get(f"data/{storage.key}")
            if entry is None:
                raise WeightsError(f"storage {storage.key} is not in its archive")
            if entry.size < storage.bytes:
                raise WeightsError(f"storage {storage.key} has {entry.size:,} bytes, and should have {storage.bytes:,}")

        def load(storage: Storage) -> np.ndarray:
            elements = _elements(entries[f"data/{storage.key}"].read(file), storage)
            return elements if order.decode() == sys.byteorder else elements.byteswap()

        return contents(pickled, load, path.stat().st_size)


def read_legacy(path: Path) -> Contents:
    """Read a file of PyTorch 0.4 to 1.5, or written with `_use_new_zipfile_serialization=False`; errors as of `read_zip`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2 * MOST_BYTES)
        magic = read_pickle(head)
        if magic.value != _LEGACY_MAGIC:
            raise WeightsError("it does not begin as PyTorch's files do")
        version = read_pickle(head, magic.end)
        machine = read_pickle(head, version.end)
        if version.value != _LEGACY_VERSION or not isinstance(machine.value, dict):
            raise WeightsError(f"it is not of version {_LEGACY_VERSION} of PyTorch's format, the only one that is known")
        if machine.value.get("little_endian") is not True:
            raise WeightsError("it was written on a big-endian machine; save it again there with PyTorch 1.6 or later")
        pickled = read_pickle(head, machine.end)
        keys = read_pickle(head, pickled.end)
        # Texts alone are compared: anything else could be so deep that to write or compare it would recurse.
        listed = keys.value if isinstance(keys.value, list) and all(isinstance(key, str) for key in keys.value) else []
        if sorted(listed) != sorted(pickled.storages):
            raise WeightsError("its list of storages is not that of its tensors")
        at = keys.end
        places: dict[str, int] = {}
        for key in listed:
            storage = pickled.storages[key]
            file.seek(at)
            if file.read(8) != struct.pack("<q", storage.length):
                raise WeightsError(f"storage {key} is cut off, or has another length than its tensors say")
            places[key] = at + 8
            at += 8 + storage.bytes
            if at > size:
                raise WeightsError(f"it is cut off: storage {key} ends at byte {at:,} of {size:,}")

        def load(storage: Storage) -> np.ndarray:
            return _elements(read_bytes(file, places[storage.key], storage.bytes), storage)

        return contents(pickled, load, size)


def write_zip(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as PyTorch's zip format, whole or not at all; PyTorch loads it with `weights_only=True`.

    Args:
        path: the file.
        tensors: name to array, of the dtypes in `DTYPES`.

    Raises:
        WeightsError: an array of another dtype, or a file that cannot be written.
    """
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), write_pickle(arrays))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        for number, array in enumerate(arrays.values()):
            info = zipfile.ZipInfo(f"archive/data/{number}")
            # Storages begin at multiples of 64 bytes, so that PyTorch can map the file into memory.
            padding = -(archive.start_dir + 34 + len(info.filename)) % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            archive.writestr(info, array.reshape(-1).view(np.uint8).data)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


class _BoundedFile(io.BufferedReader):
    """A file that is never read by more at once than the directory of an archive needs, whatever the archive says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MOST_BYTES:
            raise WeightsError(f"its archive has a directory of {size:,} bytes")
        return super().read(size)


class _Entry(NamedTuple):
    """One entry of an archive: where its bytes are."""

    name: str
    at: int
    size: int
    crc: int

    def read(self, file: io.BufferedReader) -> np.ndarray:
        data = read_bytes(file, self.at, self.size)
        if self.crc and zlib.crc32(data.data) != self.crc:  # PyTorch can leave the sums out, which are 0 then
            raise WeightsError(f"entry {self.name} of its archive is damaged: its checksum differs. Download it again")
        return data


def _entries(file: io.BufferedReader) -> dict[str, _Entry]:
    """The entries of an archive of PyTorch, without the name of their one common folder."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise WeightsError(f"its archive is cut off or damaged ({error}). Download or save it again") from error
    if archive.start_dir != _directory(file):
        raise WeightsError("its archive has no directory where it says, so that different programs would read different files")
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = [info.orig_filename for info in infos]
    root = next((name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
    if root is None or f"{root}/constants.pkl" in names:
        raise WeightsError(_other_archive(names))
    if len(infos) > _MOST_ENTRIES:
        raise WeightsError(f"its archive has {len(infos):,} entries")
    entries: dict[str, _Entry] = {}
    seen: set[str] = set()
    end = 0
    for info, name in zip(infos, names, strict=True):
        is_folder = name.endswith("/") and info.file_size == 0  # as zip adds them, PyTorch does not
        parts = name.removesuffix("/" if is_folder else "").split("/")
        if parts[0] != root or not all(parts) or ".." in parts or "\\" in name or "\0" in name:
            raise WeightsError(f"its archive has an entry {name!r}, outside of its folder {root}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise WeightsError(f"entry {name} of its archive is compressed or encrypted, as PyTorch writes none")
        if info.header_offset < end:
            raise WeightsError(f"entry {name} of its archive lies before it, or over another")
        at = _start(file, info)
        end = at + info.file_size
        if end > archive.start_dir:
            raise WeightsError(f"entry {name} of its archive ends beyond it")
        if is_folder:
            continue
        inner = name.removeprefix(f"{root}/")
        if inner.casefold() in seen:  # PyTorch does not tell capitals from small letters here
            raise WeightsError(f"entry {name} occurs twice in its archive")
        seen.add(inner.casefold())
        entries[inner] = _Entry(name, at, info.file_size, info.CRC)
    return entries


def _directory(file: io.BufferedReader) -> int:
    """Where the archive's last record says that its directory is, if the directory ends where that record begins; else -1.

    Python looks for the directory before the record, PyTorch where the record says.
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
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7"):  # zip64: the record with long numbers stands before, 56 bytes long
        end -= 20 + 56
        record = tail[max(0, end - last) :][:56]
        (place,) = struct.unpack_from("<Q", tail, at - 12)
        if place != end or end < last or not record.startswith(b"PK\6\6" + struct.pack("<Q", 44)):
            return -1
        length, start = struct.unpack_from("<QQ", record, 40)
        if short[0] not in (length, 0xFFFFFFFF) or short[1] not in (start, 0xFFFFFFFF):
            return -1
    return start if start + length == end else -1


def _start(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after its own header, which must tell of the same entry."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise WeightsError(f"entry {info.orig_filename} of its archive is damaged")
    method, name_length, extra_length = struct.unpack("<8xH16xHH", header)
    name = file.read(name_length)
    if method != zipfile.ZIP_STORED or name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise WeightsError(f"entry {info.orig_filename} of its archive is named or compressed otherwise in its own header")
    return info.header_offset + 30 + name_length + extra_length


def _other_archive(names: list[str]) -> str:
    """What an archive is that holds no state dict."""
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "it is a TorchScript archive, which holds code. Take its weights out in PyTorch: "
            "`torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')`"
        )
    if any(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays (.npz). Give them to `scconv_jax.from_torch` as a dict"
    if "model.weights.h5" in names or "config.json" in names:
        return "it is a Keras model. Only PyTorch files, safetensors and our own runs can be read"
    return "it is a zip archive, but not of PyTorch. Unpack it, and give the file of weights inside"


def _elements(data: np.ndarray, storage: Storage) -> np.ndarray:
    data = data[: storage.bytes]
    return data != 0 if storage.dtype == np.bool_ else data.view(storage.dtype)
