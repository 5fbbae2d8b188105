"""A folder of training and test images: PyTorch's ImageNet layout, `SPLIT/CLASS/…/IMAGE`, or `CLASS/…/IMAGE` to be split."""

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from train.config import ConfigError
from train.data.index import SUFFIXES, FolderRecords, class_folders, describe, load_index

LAYOUT = "train/CLASS/IMAGE and val/CLASS/IMAGE"
OTHER_NAMES = ("valid", "validation", "test")
"""Names that other data sets give to `val`."""

Opened = tuple[FolderRecords, FolderRecords, list[str]]
"""Training images, test images, and notes for the user."""


def open_folder(directory: str, *, val_fraction: float = 0, seed: int = 0, testing: bool = False) -> Opened:
    """Open training and test images: `DIR/train` and `DIR/val`.

    Args:
        directory: DIR.
        val_fraction: If above 0, the part of each class to test on. `DIR/CLASS`, or `DIR/train/CLASS`, is then divided, and
            there is no `DIR/val`.
        seed: Seed of the division.
        testing: Open no training images, because the network is already trained. `DIR/train`, if it exists, gives the classes,
            of which `DIR/val` may lack some.
    """
    try:
        train, test, notes = _open(directory, val_fraction, seed, testing)
    except OSError as error:
        raise ConfigError(_one_line(f"data.dir: cannot read {error.filename}: {error.strerror}")) from error
    except ConfigError as error:
        raise ConfigError(_one_line(str(error))) from error
    return train, test, [_one_line(note) for note in notes]


def _open(directory: str, val_fraction: float, seed: int, testing: bool) -> Opened:
    root = Path(directory).expanduser()
    if not directory:
        raise ConfigError(f"data.dir must be the folder that holds {LAYOUT}, found ''")
    if not root.is_dir():
        raise ConfigError(f"data.dir: there is no folder {root}")
    has_train, has_val = ((root / split).is_dir() for split in ("train", "val"))
    if val_fraction and has_val:
        raise ConfigError(f"data.val_fraction must be 0, found {val_fraction:g}: {root} holds its test images in val")
    if val_fraction:
        return _divide(load_index(root / "train" if has_train else root), val_fraction, seed)
    if not has_val or not (has_train or testing):
        raise ConfigError(_describe_other_layout(root, has_train, has_val))
    return _open_val(root, has_train) if testing else _open_both(root)


def _open_both(root: Path) -> Opened:
    train = load_index(root / "train")
    _check_classes(train.root, train.classes)
    test = load_index(root / "val")
    only = {"train": set(train.classes) - set(test.classes), "val": set(test.classes) - set(train.classes)}
    differences = [f"only in {split}: {_listed(sorted(classes))}" for split, classes in only.items() if classes]
    if differences:
        below = _folders_below(test.root, test.classes)
        raise ConfigError(f"train and val of {root} must hold the same classes; {'; '.join(differences)}{below}")
    return train, test, [*_notes(train), *_notes(test)]


def _open_val(root: Path, has_train: bool) -> Opened:
    test, notes = load_index(root / "val"), []
    of_train = class_folders(root / "train") if has_train else []
    classes = of_train or list(test.classes)
    _check_classes(root / ("train" if of_train else "val"), classes)
    if unknown := sorted(set(test.classes) - set(classes)):
        raise ConfigError(f"val of {root} holds classes that train does not hold: {_listed(unknown)}")
    if not of_train:
        notes.append(f"{root} has no {'classes in ' * has_train}train: the {len(classes)} classes are those of val.")
    if missing := sorted(set(classes) - set(test.classes)):
        notes.append(f"{test.root} has no images of {len(missing)} of the {len(classes)} classes of train: {_listed(missing)}.")
    labels = np.asarray([classes.index(test.classes[label]) for label in test.labels], np.int32)
    test = replace(test, classes=tuple(classes), labels=labels)
    return _select(test, np.zeros(len(test), bool)), test, [*_notes(test), *notes]


def _divide(records: FolderRecords, fraction: float, seed: int) -> Opened:
    """Divide images by class. A hash of seed and path decides, so an image stays where it is when others are added."""
    _check_classes(records.root, records.classes)
    prefix, start = f"{seed}".encode(), len(os.fsencode(records.root))
    paths = (os.fsencode(records.name(index))[start:] for index in range(len(records)))
    draws = [int.from_bytes(hashlib.blake2b(prefix + path, digest_size=8).digest()) for path in paths]
    labels = np.repeat(records.labels, np.diff(records.starts))
    order, chosen = np.lexsort((np.asarray(draws, np.uint64), labels)), np.zeros(len(records), bool)
    counts = np.bincount(labels)
    tests = np.minimum(counts - 1, np.maximum(1, np.round(fraction * counts))).astype(int)
    for first, count in zip(np.cumsum(counts) - counts, tests, strict=True):
        chosen[order[first : first + count]] = True
    train, test = _select(records, ~chosen), _select(records, chosen)
    note = (
        f"{records.root}: {fraction:g} of the images of each class are for testing (data.val_fraction, by seed {seed}), "
        f"{len(test):,} of {len(records):,}"
    )
    if single := [records.classes[label] for label in np.flatnonzero(tests == 0)]:
        note += f"; none of {_listed(single)}, with one image each"
    return train, test, [*_notes(records), f"{note}."]


def _select(records: FolderRecords, chosen: np.ndarray) -> FolderRecords:
    """Return the images for which `chosen`, bool (images,), is true."""
    lengths = np.diff(records.offsets)
    return replace(
        records,
        starts=np.append(0, np.cumsum(chosen))[records.starts],
        names=records.names[np.repeat(chosen, lengths)],
        offsets=np.append(0, np.cumsum(lengths[chosen])),
    )


def _check_classes(root: Path, classes: Sequence[str]) -> None:
    """Refuse a single class: every network would be right about it."""
    if len(classes) < 2:
        raise ConfigError(
            f"{root} holds a single class, {classes[0]}: it must hold a folder for each of two classes or more, "
            f"{root.name}/CLASS/IMAGE{_folders_below(root, classes)}"
        )


def _folders_below(root: Path, classes: Sequence[str]) -> str:
    """Return the end of an error message if the only class folder of `root` holds the folders that were meant."""
    below = class_folders(root / classes[0]) if len(classes) == 1 else []
    return f". The classes may be the folders in {classes[0]} ({_listed(below)}): move them to {root}" if below else ""


def _notes(records: FolderRecords) -> list[str]:
    """Return notes for the user about an index: what was left out, and whether the classes may be one level too high."""
    notes = []
    if records.left_out:
        count = sum(records.left_out.values())
        notes.append(f"{records.root}: left out {describe(records.left_out)}; {count:,} in all.")
    if all(os.sep in folder for folder in records.folders):
        notes.append(
            f"{records.root}: no image lies directly in a class folder, but in folders below, such as {records.folders[0]}; "
            f"the classes are the upper folders, such as {records.classes[0]}."
        )
    return notes


def _describe_other_layout(root: Path, has_train: bool, has_val: bool) -> str:
    """Return the error for a folder without `train` or without `val`: what was found and what may have been meant."""
    names = sorted(entry.name for entry in os.scandir(root))
    missing = [split for split, there in (("train", has_train), ("val", has_val)) if not there]
    message = f"data.dir must hold {LAYOUT}; {root} has no {' and no '.join(missing)} (found {_listed(names) or 'nothing'})"
    near = [root / name for name in names] + list(root.absolute().parents)[:2]
    whole = [place for place in near if (place / "train").is_dir() and (place / "val").is_dir()]
    other = [name for name in OTHER_NAMES if name in names]
    if whole and not has_train and not has_val:
        return f"{message}. {whole[0]} holds both: give that folder"
    if other and has_train:
        command = shlex.join(["mv", str(root / other[0]), str(root / "val")])
        return f"{message}. If {other[0]} holds the test images, name it val: {command}"
    above = root / "train" if has_train else root
    classes = [] if has_val else class_folders(above)
    if any(name.lower().endswith(SUFFIXES) for cls in classes[:1] for name in os.listdir(above / cls)):
        return f"{message}. To test on a fifth of the images of each class folder of {above}: --data.val-fraction 0.2"
    return message


def _listed(names: Sequence[str]) -> str:
    import scconv_jax

    return scconv_jax.messages.listed(names)


def _one_line(text: str) -> str:
    """Return a text as every terminal can print it: names of files may hold line ends, and bytes that are not UTF-8."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
