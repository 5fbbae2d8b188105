"""The index of a folder of images, `CLASS/…/IMAGE`, in the order of torchvision's `ImageFolder`.

Differences: hidden files and folders, and folders that systems leave behind, are neither images nor classes; more suffixes are
those of images; only regular files are. What is left out is counted by kind.

The index is cached with the modification times of all its folders, and made again when one of them has changed. All
file names are stored as one block of bytes: 1.28 million take 40 MB, as strings over 100.
"""

import contextlib
import hashlib
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config import ConfigError

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jfif", ".jpe", ".avif", ".avifs", ".jp2", ".j2k",
    ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".icb", ".vda", ".vst", ".apng", ".bw",
    ".cur", ".dcx", ".dds", ".dib", ".icns", ".ico", ".mpo", ".msp", ".pcx", ".psd", ".qoi", ".ras", ".rgb", ".rgba",
    ".sgi", ".xbm", ".xpm",
)  # fmt: skip
"""Suffixes of image files: `scconv_jax.images.SUFFIXES`, which a test compares. Importing the library would import JAX."""
SYSTEM_FOLDERS = {
    "#recycle", "#snapshot", "$recycle.bin", "@__thumb", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "__macosx",
    "__pycache__", "found.000", "lost+found", "lost.dir", "system volume information",
}  # fmt: skip
"""Folders that operating systems, archives and storage devices leave behind, in lower case."""
RULES = repr((2, sorted(SUFFIXES), sorted(SYSTEM_FOLDERS)))
"""What an index holds and how it is stored. An index that was made by other rules is not used."""
THREADS = 16
SETTLED_NS = 2 * 10**9
"""A folder read this soon after a change may change again without a new modification time."""


@dataclass(frozen=True)
class FolderRecords:
    """The images of a folder, sorted by class, folder and name."""

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
    left_out: Mapping[str, int]
    """Kinds of files and folders that are no images and no classes, such as `*.txt` and `@eaDir`, and how many of each."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of an image file, and its label."""
        # Opening a pipe would wait for its other end, if not for O_NONBLOCK.
        with open(self.name(index), "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("not a regular file")
            return file.read(), int(self.labels[self._folder(index)])

    def name(self, index: int) -> str:
        """Return the path of an image."""
        name = os.fsdecode(self.names[self.offsets[index] : self.offsets[index + 1]].tobytes())
        return os.path.join(self.root, self.folders[self._folder(index)], name)

    def _folder(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1


def load_index(root: Path) -> FolderRecords:
    """Return the index of a folder, from the cache unless one of its folders has changed."""
    import scconv_jax

    root = root.resolve()
    key = hashlib.sha256(os.fsencode(root) + RULES.encode()).hexdigest()[:32]
    cached = scconv_jax.files.cache_folder() / "folders" / f"{key}.npz"
    records = _read_cache(cached, root)
    if records is None:
        records, modified = _scan(root)
        _write_cache(cached, records, modified)
    return records


def class_folders(root: Path) -> list[str]:
    """Return the names of the class folders of `root`, in the order of their labels."""
    return sorted(entry.name for entry in os.scandir(root) if _is_folder(entry) and not _is_hidden(entry.name))


def _scan(root: Path) -> tuple[FolderRecords, dict[str, int]]:
    """Make the index from the folders; also return the modification time of each folder in ns."""
    top = root.stat()
    modified = {"": top.st_mtime_ns}
    classes = class_folders(root)
    others = sorted({entry.name for entry in os.scandir(root)} - set(classes))
    left_out = Counter(kind + " outside class folders" * (kind[1:] in SUFFIXES) for kind in map(_kind, others))
    if not classes:
        raise ConfigError(_flat(root, others))
    folders, labels, starts, offsets, names, empty = [], [], [0], [np.zeros(1, np.int64)], bytearray(), {}
    with ThreadPoolExecutor(THREADS) as pool:
        for label, (found, others) in enumerate(pool.map(lambda name: _walk(root, name, top), classes)):
            left_out += others
            if not any(files for _, _, files in found):
                empty[classes[label]] = others
            for folder, time_ns, files in found:
                modified[folder] = time_ns
                if files:
                    folders.append(folder)
                    labels.append(label)
                    starts.append(starts[-1] + len(files))
                    encoded = [os.fsencode(file) for file in files]
                    offsets.append(len(names) + np.cumsum([len(name) for name in encoded]))
                    names += b"".join(encoded)
    if empty:
        import scconv_jax

        kinds = describe(sum(empty.values(), Counter())) or "nothing"
        raise ConfigError(f"{root} holds class folders without an image: {scconv_jax.messages.listed([*empty])} (found {kinds})")
    records = FolderRecords(
        root=root,
        classes=tuple(classes),
        folders=tuple(folders),
        labels=np.asarray(labels, np.int32),
        starts=np.asarray(starts, np.int64),
        names=np.frombuffer(names, np.uint8),
        offsets=np.concatenate(offsets),
        left_out=dict(left_out),
    )
    return records, modified


def _walk(root: Path, folder: str, top: os.stat_result) -> tuple[list[tuple[str, int, list[str]]], Counter[str]]:
    """Return what `folder` and all folders in it hold, by path, and a count of what was left out.

    Each folder is (path relative to `root`, modification time in ns, names of images). Links are followed, except back to a
    folder that contains them; `top` is the status of `root`.
    """
    found, waiting, left_out = [], [(folder, [(top.st_dev, top.st_ino)])], Counter()
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        status, files = os.stat(path), []
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                name, regular = entry.name, entry.is_file(follow_symlinks=False)
                is_image = name[0] != "." and name.lower().endswith(SUFFIXES)
                if regular and is_image:
                    files.append(name)
                elif not regular and _is_folder(entry) and not _is_hidden(name):
                    waiting.append((os.path.join(folder, name), [*above, here]))
                elif is_image and entry.is_symlink():  # perhaps broken, but it may be whole tomorrow
                    files.append(name)
                else:
                    left_out[f"{name} (not a regular file)" if is_image else _kind(name)] += 1
        found.append((folder, status.st_mtime_ns, sorted(files)))
    return sorted(found), left_out


def _flat(root: Path, names: list[str]) -> str:
    """Return the error for a folder without class folders."""
    message = f"{root} must hold a folder for each class, found {describe(Counter(map(_kind, names))) or 'nothing'}"
    image = next((name for name in names if _kind(name)[1:] in SUFFIXES), None)
    if image is None:
        return message
    if image.startswith("ILSVRC2012_val_"):
        return (
            f"{message}, as ImageNet's archive unpacks: run valprep.sh of github.com/soumith/imagenetloader.torch in that folder"
        )
    return f"{message}: move each image into the folder of its class, {os.path.join(root.name, 'CLASS', image)}"


def describe(left_out: Mapping[str, int]) -> str:
    """Return the kinds of `left_out` as text, the most frequent first: `*.txt (20), @eaDir`."""
    import scconv_jax

    kinds = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
    return scconv_jax.messages.listed([f"{kind} ({left_out[kind]:,})" if left_out[kind] > 1 else kind for kind in kinds])


def _kind(name: str) -> str:
    """Return the kind of a file or folder that is left out: its suffix, or its name if it is hidden or of the system."""
    suffix = name[name.rfind(".") :]
    if _is_hidden(name):
        return name if suffix == name or name[0] != "." else f"{name[: 1 + name.startswith('._')]}*"
    known = 2 <= len(suffix) <= 9 and suffix[0] == "." and suffix[1:].isalnum() and not suffix[1:].isdigit()
    return f"*{suffix.lower()}" if known else "files of no known suffix"


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name.lower() in SYSTEM_FOLDERS


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
            left_out = dict(zip(_split(arrays["left_out"]), arrays["left_out_counts"].tolist(), strict=False))
    except Exception:  # absent, or damaged: zip files raise many types
        return None
    watched, times = texts.pop("watched"), numbers.pop("times")
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            now = list(pool.map(lambda folder: os.stat(os.path.join(root, folder)).st_mtime_ns, watched))
    except OSError:  # a folder is gone
        return None
    return FolderRecords(root, **texts, **numbers, left_out=left_out) if now == times.tolist() else None


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
                left_out=_joined(records.left_out),
                left_out_counts=np.asarray(list(records.left_out.values()), np.int64),
            )


def _joined(texts: Iterable[str]) -> np.ndarray:
    """Return texts as one array of bytes; no file name contains a zero byte."""
    return np.frombuffer(b"\0".join(os.fsencode(text) for text in texts), np.uint8)


def _split(array: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(part) for part in array.tobytes().split(b"\0"))
