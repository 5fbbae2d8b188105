"""A folder of images, `SPLIT/CLASS/…/IMAGE`: the PyTorch ImageNet example's layout, in the order of torchvision's `ImageFolder`.

The index of a split is made once and kept in the user's cache, with the time of change of every folder in it; where one has
changed, it is made anew. All names are one block of bytes: 1.28 million take 40 MB, as strings over 100.
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
"""Of image files, in any case: torchvision's list."""
THREADS = 16
SETTLED_NS = 2 * 10**9
"""A folder that changed later than this before it was read might change again within the same tick of its clock."""


@dataclass(frozen=True)
class FolderRecords:
    """The images of one split, sorted by class, folder and name."""

    root: Path
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    """Relative to `root`, those that hold images."""
    labels: np.ndarray
    """Class of each folder: int32 (folders,)."""
    starts: np.ndarray
    """Number of the first image of each folder, and of all images: int64 (folders + 1,)."""
    names: np.ndarray
    """All file names, one after the other: uint8 (bytes,)."""
    offsets: np.ndarray
    """Where each name begins, and the last one ends: int64 (images + 1,)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of an image file, and its label."""
        folder = self._folder(index)
        with open(self._path(index, folder), "rb") as file:
            return file.read(), int(self.labels[folder])

    def name(self, index: int) -> str:
        """The path of an image."""
        return self._path(index, self._folder(index))

    def _folder(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _path(self, index: int, folder: int) -> str:
        name = os.fsdecode(self.names[self.offsets[index] : self.offsets[index + 1]].tobytes())
        return os.path.join(self.root, self.folders[folder], name)


def open_folder(directory: str) -> tuple[FolderRecords, FolderRecords]:
    """Training and test images: `DIR/train` and `DIR/val`.

    Raises:
        ConfigError: the folder is not of this layout or cannot be read, a class has no image, or the two hold different classes.
    """
    try:
        return _open(directory)
    except OSError as error:
        raise ConfigError(f"data.dir: cannot read {error.filename}: {error.strerror}") from error


def _open(directory: str) -> tuple[FolderRecords, FolderRecords]:
    root = Path(directory).expanduser()
    if not directory:
        raise ConfigError("data.dir must be the folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE, found ''")
    if not root.is_dir():
        raise ConfigError(f"data.dir: there is no folder {root}")
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in os.scandir(root))[:10]) or "nothing"
        raise ConfigError(
            f"data.dir must hold train/CLASS/IMAGE and val/CLASS/IMAGE; {root} has no {' and no '.join(missing)} (found {found})"
        )
    train, test = load_index(root / "train"), load_index(root / "val")
    if train.classes != test.classes:
        differences = [
            f"only in {split}: {_some(sorted(set(own.classes) - set(other.classes)))}"
            for split, own, other in (("train", train, test), ("val", test, train))
            if set(own.classes) - set(other.classes)
        ]
        raise ConfigError(f"train and val of {root} must hold the same classes; {'; '.join(differences)}")
    return train, test


def load_index(root: Path) -> FolderRecords:
    """The index of a split, from the cache where no folder of it has changed.

    Raises:
        ConfigError: there is no class folder, or one without an image.
    """
    root = root.resolve()
    cached = cache_folder() / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.npz"
    records = _read_cache(cached, root)
    if records is None:
        records, changed = _scan(root)
        _write_cache(cached, records, changed)
    return records


def cache_folder() -> Path:
    """Where indices are kept: `SCCONV_JAX_CACHE`, or `scconv_jax` in the user's cache folder."""
    own = os.environ.get("SCCONV_JAX_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(user) / "scconv_jax").expanduser() / "folders"


def _scan(root: Path) -> tuple[FolderRecords, dict[str, int]]:
    """The index read off the folders, and every folder of it with the time of its last change in ns."""
    top = root.stat()
    changed = {"": top.st_mtime_ns}
    classes = sorted(entry.name for entry in os.scandir(root) if _is_folder(entry))
    if not classes:
        raise ConfigError(f"{root} must hold a folder for each class, found none")
    folders, labels, starts, offsets, names = [], [], [0], [np.zeros(1, np.int64)], bytearray()
    empty = []
    with ThreadPoolExecutor(THREADS) as pool:
        for label, found in enumerate(pool.map(lambda name: _walk(root, name, top), classes)):
            before = starts[-1]
            for folder, time_ns, files in found:
                changed[folder] = time_ns
                if files:
                    folders.append(folder)
                    labels.append(label)
                    starts.append(starts[-1] + len(files))
                    encoded = [os.fsencode(file) for file in files]
                    offsets.append(len(names) + np.cumsum([len(name) for name in encoded]))
                    names += b"".join(encoded)
            if starts[-1] == before:
                empty.append(classes[label])
    if empty:
        raise ConfigError(f"{root} holds class folders without an image ({', '.join(EXTENSIONS)}): {_some(empty)}")
    records = FolderRecords(
        root=root,
        classes=tuple(classes),
        folders=tuple(folders),
        labels=np.asarray(labels, np.int32),
        starts=np.asarray(starts, np.int64),
        names=np.frombuffer(names, np.uint8),
        offsets=np.concatenate(offsets),
    )
    return records, changed


def _walk(root: Path, folder: str, top: os.stat_result) -> list[tuple[str, int, list[str]]]:
    """Every folder at and under `folder`, by path: itself relative to `root`, the time of its last change, its images by name.

    Links are followed, but not back to a folder in which they lie; `top` is the status of `root`.
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
    except OSError:  # a link to itself, or to where one may not look
        return False


def _read_cache(path: Path, root: Path) -> FolderRecords | None:
    """The index as it was written, unless a folder has changed since, or the file is damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            texts = {name: _split(arrays[name]) for name in ("classes", "folders", "watched")}
            numbers = {name: arrays[name] for name in ("labels", "starts", "names", "offsets", "times")}
    except Exception:  # absent, or damaged in one of a zip file's many ways
        return None

    def time_of(folder: str) -> int:
        return os.stat(os.path.join(root, folder)).st_mtime_ns

    watched, times = texts.pop("watched"), numbers.pop("times")
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            now = list(pool.map(time_of, watched))
    except OSError:  # a folder is gone
        return None
    return FolderRecords(root, **texts, **numbers) if now == times.tolist() else None


def _write_cache(path: Path, records: FolderRecords, changed: dict[str, int]) -> None:
    """Keep an index, whole or not at all, unless its folders are changing right now."""
    if max(changed.values()) > time.time_ns() - SETTLED_NS:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(
                file,
                classes=_joined(records.classes),
                folders=_joined(records.folders),
                watched=_joined(changed),
                times=np.asarray(list(changed.values()), np.int64),
                labels=records.labels,
                starts=records.starts,
                names=records.names,
                offsets=records.offsets,
            )
        partial.replace(path)
    except OSError:  # a cache that cannot be written costs time, no more
        with contextlib.suppress(OSError):
            partial.unlink()


def _joined(texts: Iterable[str]) -> np.ndarray:
    """Texts as one array of bytes; no file name holds a zero byte."""
    return np.frombuffer(b"\0".join(os.fsencode(text) for text in texts), np.uint8)


def _split(array: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(part) for part in array.tobytes().split(b"\0"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
