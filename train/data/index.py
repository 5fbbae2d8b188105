"""The index of a folder of images, `CLASS/…/IMAGE`, in the order of torchvision's `ImageFolder`.

The index is cached with the modification times of all its folders, and made again when one of them has changed. All
file names are stored as one block of bytes: 1.28 million take 40 MB, as strings over 100.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config import ConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of image files, in any case: torchvision's list."""
THREADS = 16
SETTLED_NS = 2 * 10**9
"""A folder read this soon after a change may change again without a new modification time."""


@dataclass(frozen=True)
class FolderRecords:
    """The images of one split, sorted by class, folder and name."""

    root: Path
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    """Folders that hold images, relative to `root`."""
    labels: np.ndarray
    """Class of each folder: int32 (folders,)."""
    starts: np.ndarray
    """Index of the first image of each folder, and the number of all images: int64 (folders + 1,)."""
    names: np.ndarray
    """All file names, one after the other: uint8 (bytes,)."""
    offsets: np.ndarray
    """Start of each name in `names`, and the end of the last: int64 (images + 1,)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of an image file, and its label."""
        with open(self.name(index), "rb") as file:
            return file.read(), int(self.labels[self._folder(index)])

    def name(self, index: int) -> str:
        """Return the path of an image."""
        name = os.fsdecode(self.names[self.offsets[index] : self.offsets[index + 1]].tobytes())
        return os.path.join(self.root, self.folders[self._folder(index)], name)

    def _folder(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1


def load_index(root: Path) -> FolderRecords:
    """Return the index of a split, from the cache unless one of its folders has changed."""
    import scconv_jax

    root = root.resolve()
    cached = scconv_jax.files.cache_folder() / "folders" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.npz"
    records = _read_cache(cached, root)
    if records is None:
        records, modified = _scan(root)
        _write_cache(cached, records, modified)
    return records


def _scan(root: Path) -> tuple[FolderRecords, dict[str, int]]:
    """Make the index from the folders; also return the modification time of each folder in ns."""
    top = root.stat()
    modified = {"": top.st_mtime_ns}
    classes = sorted(entry.name for entry in os.scandir(root) if _is_folder(entry))
    if not classes:
        raise ConfigError(f"{root} must hold a folder for each class, found none")
    folders, labels, starts, offsets, names = [], [], [0], [np.zeros(1, np.int64)], bytearray()
    with ThreadPoolExecutor(THREADS) as pool:
        for label, found in enumerate(pool.map(lambda name: _walk(root, name, top), classes)):
            for folder, time_ns, files in found:
                modified[folder] = time_ns
                if files:
                    folders.append(folder)
                    labels.append(label)
                    starts.append(starts[-1] + len(files))
                    encoded = [os.fsencode(file) for file in files]
                    offsets.append(len(names) + np.cumsum([len(name) for name in encoded]))
                    names += b"".join(encoded)
    if empty := [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]:
        import scconv_jax

        raise ConfigError(
            f"{root} holds class folders without an image ({', '.join(EXTENSIONS)}): {scconv_jax.messages.listed(empty)}"
        )
    records = FolderRecords(
        root=root,
        classes=tuple(classes),
        folders=tuple(folders),
        labels=np.asarray(labels, np.int32),
        starts=np.asarray(starts, np.int64),
        names=np.frombuffer(names, np.uint8),
        offsets=np.concatenate(offsets),
    )
    return records, modified


def _walk(root: Path, folder: str, top: os.stat_result) -> list[tuple[str, int, list[str]]]:
    """Return (path relative to `root`, modification time in ns, names of images) of `folder` and all folders in it, by path.

    Links are followed, except back to a folder that contains them; `top` is the status of `root`.
    """
    found, waiting = [], [(folder, [(top.st_dev, top.st_ino)])]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        status, files = os.stat(path), []
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    waiting.append((os.path.join(folder, entry.name), [*above, here]))
                elif entry.name.lower().endswith(EXTENSIONS):
                    files.append(entry.name)
        found.append((folder, status.st_mtime_ns, sorted(files)))
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to a place without permission
        return False


def _read_cache(path: Path, root: Path) -> FolderRecords | None:
    """Return the cached index, or None if there is none, it is damaged, or a folder has changed since."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            texts = {name: _split(arrays[name]) for name in ("classes", "folders", "watched")}
            numbers = {name: arrays[name] for name in ("labels", "starts", "names", "offsets", "times")}
    except Exception:  # absent, or damaged: zip files raise many types
        return None
    watched, times = texts.pop("watched"), numbers.pop("times")
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            now = list(pool.map(lambda folder: os.stat(os.path.join(root, folder)).st_mtime_ns, watched))
    except OSError:  # a folder is gone
        return None
    return FolderRecords(root, **texts, **numbers) if now == times.tolist() else None


def _write_cache(path: Path, records: FolderRecords, modified: dict[str, int]) -> None:
    """Write an index to the cache, unless its folders have just changed."""
    import scconv_jax

    if max(modified.values()) > time.time_ns() - SETTLED_NS:
        return
    with contextlib.suppress(OSError):  # without a cache, the next start only takes longer
        path.parent.mkdir(parents=True, exist_ok=True)
        with scconv_jax.files.replacing(path) as partial, open(partial, "wb") as file:
            np.savez(
                file,
                classes=_joined(records.classes),
                folders=_joined(records.folders),
                labels=records.labels,
                starts=records.starts,
                names=records.names,
                offsets=records.offsets,
                watched=_joined(modified),
                times=np.asarray(list(modified.values()), np.int64),
            )


def _joined(texts: Iterable[str]) -> np.ndarray:
    """Return texts as one array of bytes; no file name contains a zero byte."""
    return np.frombuffer(b"\0".join(os.fsencode(text) for text in texts), np.uint8)


def _split(array: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(part) for part in array.tobytes().split(b"\0"))
