"""A folder of training and test images, `SPLIT/CLASS/…/IMAGE`: PyTorch's ImageNet layout."""

import os
from pathlib import Path

from train.config import ConfigError
from train.data.index import FolderRecords, load_index


def open_folder(directory: str) -> tuple[FolderRecords, FolderRecords]:
    """Open training and test images: `DIR/train` and `DIR/val`."""
    try:
        return _open(directory)
    except OSError as error:
        raise ConfigError(f"data.dir: cannot read {error.filename}: {error.strerror}") from error


def _open(directory: str) -> tuple[FolderRecords, FolderRecords]:
    import scconv_jax

    listed = scconv_jax.messages.listed
    root = Path(directory).expanduser()
    if not directory:
        raise ConfigError("data.dir must be the folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE, found ''")
    if not root.is_dir():
        raise ConfigError(f"data.dir: there is no folder {root}")
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        found = listed(sorted(entry.name for entry in os.scandir(root))) or "nothing"
        raise ConfigError(
            f"data.dir must hold train/CLASS/IMAGE and val/CLASS/IMAGE; {root} has no {' and no '.join(missing)} (found {found})"
        )
    train, test = load_index(root / "train"), load_index(root / "val")
    only = {"train": set(train.classes) - set(test.classes), "val": set(test.classes) - set(train.classes)}
    differences = [f"only in {split}: {listed(sorted(classes))}" for split, classes in only.items() if classes]
    if differences:
        raise ConfigError(f"train and val of {root} must hold the same classes; {'; '.join(differences)}")
    return train, test
