"""Image classification sets as TensorFlow Datasets keeps them, read without TensorFlow.

Both file formats give records at random access: array_record by its own reader, TFRecord by the places of its records, which
are read off the headers of a file (length, checksum) when it is first used. TFDS itself says what is in a record.
"""

import functools
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from train.config import ConfigError
from train.data.batches import UnreadableImageError


class Serialized(Protocol):
    """Serialized records at random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


class TFRecords:
    """The records of TFRecord files, of which `files` are TFDS's `FileInstruction`s."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files
        self._starts = [0, *accumulate(file.take for file in files)]
        self._places = functools.cache(_places)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> bytes:
        number = bisect_right(self._starts, index) - 1
        file = self._files[number]
        offset, length = self._places(file.filename, file.examples_in_shard)[file.skip + index - self._starts[number]]
        with open(file.filename, "rb") as opened:
            opened.seek(offset)
            return opened.read(length)


@dataclass(frozen=True)
class TfdsRecords:
    """The images of one split."""

    classes: tuple[str, ...]
    split: str
    files: Sequence[Any]
    """TFDS's `FileInstruction`s: which records of which file."""
    serialized: Serialized
    features: Any
    """TFDS's `FeaturesDict`."""
    image: str
    """Name of the feature that is the image."""
    label: str
    """Name of the feature that is its class."""

    def __len__(self) -> int:
        return len(self.serialized)

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of an image file, and its label.

        Raises:
            UnreadableImageError: the record is damaged.
            ConfigError: the file is damaged, or the label is none of the classes.
        """
        from tensorflow_datasets import decode

        try:
            record = self.features.deserialize_example_np(self.serialized[index], decoders={self.image: decode.SkipDecoding()})
        except ConfigError:
            raise
        except Exception as error:  # of every kind: RuntimeError by array_record, DecodeError, KeyError and more by TFDS
            raise UnreadableImageError(_first_line(error)) from error
        label = int(record[self.label])
        if not 0 <= label < len(self.classes):
            raise ConfigError(
                f"{self.name(index)} has label {label}, out of the range 0 to {len(self.classes) - 1}; "
                "a split without labels cannot be trained or tested on: choose another (--data.train-split, --data.test-split)"
            )
        return record[self.image], label

    def name(self, index: int) -> str:
        """Split and number of an image, the place of its set, and its file."""
        starts = [0, *accumulate(file.take for file in self.files)]
        file = self.files[bisect_right(starts, index) - 1]
        return f"record {index} of {self.split} ({os.path.basename(file.filename)})"


def open_tfds(directory: str, name: str, train_split: str, test_split: str) -> tuple[TfdsRecords, TfdsRecords]:
    """Training and test images of a prepared set.

    Args:
        directory: of the set, or of all sets where `name` is given.
        name: `NAME`, `NAME/CONFIG`, with or without `/VERSION` (or `:VERSION`); or empty.
        train_split: as TFDS writes it, such as `train[:90%]`.
        test_split: likewise; empty: `validation`, or else `test`.

    Raises:
        ConfigError: there is no such set or split, or it does not hold one image and one label per record.
        ModuleNotFoundError: a package is missing; says how to install it.
    """
    try:
        import importlib_resources  # noqa: F401  (TFDS needs it and does not say so)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(
            f"data.name tfds needs {error.name or error}, which is not installed: pip install 'scconv-jax[train,tfds]'"
        ) from error

    folder = _find(directory, name)
    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # the metadata are damaged in one way or another
        raise ConfigError(f"data.dir: {folder} is no set of TensorFlow Datasets: {_first_line(error)}") from error
    features, file_format = builder.info.features, builder.info.file_format.value
    if file_format not in ("array_record", "tfrecord"):
        raise ConfigError(f"{folder} is in the format {file_format}; array_record and tfrecord can be read")
    image = _only(features, tfds.features.Image, "image", folder)
    label = _only(features, tfds.features.ClassLabel, "class label", folder)
    if not test_split:
        test_split = next((split for split in ("validation", "test") if split in builder.info.splits), "")
        if not test_split:
            splits = ", ".join(builder.info.splits)
            raise ConfigError(f"{folder} has neither validation nor test (found {splits}): choose by --data.test-split")

    def records(split: str, field: str) -> TfdsRecords:
        try:
            files = builder.info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            raise ConfigError(f"data.{field} {split!r} of {folder}: {_first_line(error)}") from error
        if not files:
            raise ConfigError(f"data.{field} {split!r} of {folder} holds no image")
        _allow_open_files(len(files))
        missing = [file.filename for file in files if not os.path.exists(file.filename)]
        if missing:
            raise ConfigError(f"{folder} is not whole: {len(missing)} of {len(files)} files are missing, such as {missing[0]}")
        if file_format == "array_record":
            serialized = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        else:
            serialized = TFRecords(files)
        return TfdsRecords(tuple(features[label].names), f"{split} of {folder}", files, serialized, features, image, label)

    return records(train_split, "train_split"), records(test_split, "test_split")


def _find(directory: str, name: str) -> Path:
    """The folder with `dataset_info.json`."""
    if not directory:
        raise ConfigError("data.dir must be the folder of a set of TensorFlow Datasets, or of all sets, found ''")
    root = Path(directory).expanduser()
    folder = root / name.replace(":", "/")
    if not folder.is_dir():
        where = f"; {root} holds {', '.join(sorted(path.name for path in root.iterdir())[:10])}" if root.is_dir() else ""
        raise ConfigError(f"{'data.tfds_name' if name and root.is_dir() else 'data.dir'}: there is no folder {folder}{where}")
    found = [folder] if (folder / "dataset_info.json").is_file() else []
    found = found or sorted(path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/dataset_info.json"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(root)) for path in found[:10])
        raise ConfigError(
            f"data.dir: {folder} holds {len(found)} sets of TensorFlow Datasets ({names}): choose one by --data.tfds-name"
            if found
            else f"data.dir: {folder} holds no set of TensorFlow Datasets (a folder with dataset_info.json)"
        )
    return found[0]


def _only(features: Any, kind: type, what: str, folder: Path) -> str:
    """The name of the one feature of a kind."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        all_names = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
        raise ConfigError(f"{folder} must have one {what} per record, found {len(names)} among {all_names}")
    return names[0]


def _places(path: str, count: int) -> list[tuple[int, int]]:
    """Offset and length of each record of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    size, offset, places = os.path.getsize(path), 0, []
    with open(path, "rb", buffering=0) as file:
        while offset < size and len(places) < count:
            file.seek(offset)
            header = file.read(8)
            length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
            places.append((offset + 12, length))
            offset += length + 16
    if offset != size or len(places) != count:
        raise ConfigError(f"{path} is damaged: it must hold {count} records, and {size} bytes do not")
    return places


def _allow_open_files(count: int) -> None:
    """A set of many files keeps them all open; the usual limit of 1,024 can be raised by anyone."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if wanted > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first_line(error: Exception) -> str:
    return str(error).strip("'\"").splitlines()[0] if str(error) else type(error).__name__
