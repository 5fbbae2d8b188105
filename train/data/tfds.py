"""Image classification data sets of TensorFlow Datasets (TFDS), read without TensorFlow.

Records are read with random access: array_record by its own reader, TFRecord by the positions of its records, which are read from
the record headers (length, checksum) when a file is first used. TFDS itself decodes the record.
"""

import functools
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from train.config import ConfigError
from train.data.batches import UnreadableImageError


class TFRecords:
    """The records of TFRecord files, given as TFDS's `FileInstruction`s."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files
        self._starts = [0, *accumulate(file.take for file in files)]
        self._positions = functools.cache(_positions)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> bytes:
        number = bisect_right(self._starts, index) - 1
        file = self._files[number]
        offset, length = self._positions(file.filename, file.examples_in_shard)[file.skip + index - self._starts[number]]
        with open(file.filename, "rb") as opened:
            opened.seek(offset)
            return opened.read(length)


@dataclass(frozen=True)
class TfdsRecords:
    """The images of one split."""

    classes: tuple[str, ...]
    split: str
    files: Sequence[Any]
    """TFDS's `FileInstruction`s, the records to read from each file."""
    serialized: Any
    """Serialized records with random access: `len(serialized)`, `serialized[index]` → bytes."""
    features: Any
    """TFDS's `FeaturesDict`."""
    image: str
    label: str
    """Names of the image feature and of the class label feature."""

    def __len__(self) -> int:
        return len(self.serialized)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of an image file, and its label."""
        from tensorflow_datasets import decode

        try:
            record = self.features.deserialize_example_np(self.serialized[index], decoders={self.image: decode.SkipDecoding()})
        except ConfigError:
            raise
        except Exception as error:  # array_record raises RuntimeError; TFDS DecodeError, KeyError and others
            raise UnreadableImageError(_first_line(error)) from error
        label = int(record[self.label])
        if not 0 <= label < len(self.classes):
            raise ConfigError(
                f"{self.name(index)} has label {label}, out of the range 0 to {len(self.classes) - 1}; "
                "a split without labels cannot be trained or tested on: choose another (--data.train-split, --data.test-split)"
            )
        return record[self.image], label

    def name(self, index: int) -> str:
        """Return the index of a record, its split and data set, and its file."""
        starts = [0, *accumulate(file.take for file in self.files)]
        file = self.files[bisect_right(starts, index) - 1]
        return f"record {index} of {self.split} ({os.path.basename(file.filename)})"


def open_tfds(
    directory: str, name: str, train_split: str, test_split: str, *, testing: bool = False
) -> tuple[TfdsRecords, TfdsRecords]:
    """Open training images (none if `testing`) and test images of a prepared data set, given fields of the config.

    `name` is empty, `NAME` or `NAME/CONFIG`, with or without `/VERSION` (or `:VERSION`).
    """
    try:
        import importlib_resources  # noqa: F401  (TFDS needs it without declaring it)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(
            f"data.name tfds needs {error.name or error}, which is not installed: pip install 'scconv-jax[train,tfds]'"
        ) from error

    folder = _find(directory, name)
    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # damaged metadata raise errors of many kinds
        raise ConfigError(f"data.dir: {folder} is not a data set of TensorFlow Datasets: {_first_line(error)}") from error
    features, file_format = builder.info.features, builder.info.file_format.value
    if file_format not in ("array_record", "tfrecord"):
        raise ConfigError(f"{folder} is in the format {file_format}; only array_record and tfrecord can be read")
    image = _only(features, tfds.features.Image, "image", folder)
    label = _only(features, tfds.features.ClassLabel, "class label", folder)
    splits = list(builder.info.splits)
    test_split = test_split or next((split for split in ("validation", "test") if split in splits), "")
    if not test_split:
        raise ConfigError(f"{folder} has neither validation nor test (found {', '.join(splits)}): choose by --data.test-split")

    def records(split: str, field: str) -> TfdsRecords:
        try:
            files = builder.info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            raise ConfigError(f"data.{field} {split!r} of {folder}: {_first_line(error)}") from error
        if not files:
            raise ConfigError(f"data.{field} {split!r} of {folder} has no images")
        _allow_open_files(len(files))
        missing = [file.filename for file in files if not os.path.exists(file.filename)]
        if missing:
            raise ConfigError(f"{folder} is incomplete: {len(missing)} of {len(files)} files are missing, such as {missing[0]}")
        if file_format == "array_record":
            serialized = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        else:
            serialized = TFRecords(files)
        return TfdsRecords(tuple(features[label].names), f"{split} of {folder}", files, serialized, features, image, label)

    test = records(test_split, "test_split")
    return replace(test, files=(), serialized=()) if testing else records(train_split, "train_split"), test


def _find(directory: str, name: str) -> Path:
    """Return the folder that holds `dataset_info.json`."""
    import scconv_jax

    listed = scconv_jax.messages.listed
    if not directory:
        raise ConfigError("data.dir must be the folder of one or several data sets of TensorFlow Datasets, found ''")
    root = Path(directory).expanduser()
    folder = root / name.replace(":", "/")
    if not folder.is_dir():
        where = f"; {root} holds {listed(sorted(path.name for path in root.iterdir()))}" if root.is_dir() else ""
        raise ConfigError(f"{'data.tfds_name' if name and root.is_dir() else 'data.dir'}: there is no folder {folder}{where}")
    found = [folder] if (folder / "dataset_info.json").is_file() else []
    found = found or sorted(path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/dataset_info.json"))
    if not found:
        raise ConfigError(f"data.dir: {folder} holds no data set of TensorFlow Datasets (a folder with dataset_info.json)")
    if len(found) > 1:
        names = listed([str(path.relative_to(root)) for path in found])
        raise ConfigError(
            f"data.dir: {folder} holds {len(found)} data sets of TensorFlow Datasets ({names}): choose one by --data.tfds-name"
        )
    return found[0]


def _only(features: Any, kind: type, what: str, folder: Path) -> str:
    """Return the name of the only feature of a kind."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        all_names = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
        raise ConfigError(f"{folder} must have one {what} per record, found {len(names)} among {all_names}")
    return names[0]


def _positions(path: str, count: int) -> list[tuple[int, int]]:
    """Return offset and length of each record of a TFRecord file: length (8 bytes), checksum (4), record, checksum (4)."""
    size, offset, positions = os.path.getsize(path), 0, []
    with open(path, "rb", buffering=0) as file:
        while offset < size and len(positions) < count:
            file.seek(offset)
            header = file.read(8)
            length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
            positions.append((offset + 12, length))
            offset += length + 16
    if offset != size or len(positions) != count:
        raise ConfigError(f"{path} is damaged: expected {count} records, but they do not fill its {size} bytes exactly")
    return positions


def _allow_open_files(count: int) -> None:
    """Raise the limit on open files, usually 1,024: the files of a data set all stay open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 1024 if hard == resource.RLIM_INFINITY else min(2 * count + 1024, hard)
    if wanted > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first_line(error: Exception) -> str:
    return (str(error).strip("'\"") or type(error).__name__).splitlines()[0]
