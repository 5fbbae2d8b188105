"""Prepare images for training: `python -m train.prepare SRC OUT`.

`SRC` is a folder of image files, `SRC/train/CLASS/IMAGE` and `SRC/val/CLASS/IMAGE`. `OUT` becomes a data set of TensorFlow
Datasets (TFDS) in array_record: a few large files instead of many small ones. The bytes of each image do not change.

All files are written to `OUT.partial`, which is renamed to `OUT` at the end. A second start writes only the missing files.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from train.config import ConfigError, Data
from train.config.files import check_utf8, local_path
from train.data.datasets import ArraySource, load_digits
from train.data.folder import open_folder
from train.data.index import FolderRecords
from train.run.workdir import LOCK, locked_folder
from train.streams import mend_streams

SHARD = 8192
"""Images per file: about a gigabyte of ImageNet."""
PLAN = "plan.txt"
"""File in `OUT.partial` that identifies the images to write."""


class Shard(NamedTuple):
    """A file to write, and the indices of its images."""

    path: Path
    records: FolderRecords
    indices: range


def prepare_folder(source: str, out: Path, *, workers: int, shard: int = SHARD, val_fraction: float = 0) -> None:
    """Write a folder of image files as a TFDS data set, with `shard` images per file, by `workers` threads.

    `val_fraction` is that of `open_folder`.
    """
    try:
        import importlib_resources  # noqa: F401  (TFDS needs it, but does not declare it)
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise ModuleNotFoundError(
            f"preparing a set needs {error.name or error}, which is not installed: pip install 'scconv-jax[train,tfds]'"
        ) from error

    try:
        train, test, notes = open_folder(source, val_fraction=val_fraction)
    except ConfigError as error:
        raise ConfigError(_in_own_words(str(error))) from error
    for note in notes:
        print(_in_own_words(note))
    splits = {"train": train, "validation": test}
    classes = splits["train"].classes
    _check_names(classes)
    proto: Any = tf_example_pb2
    kinds = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=classes), "file_name": tfds.features.Text()}
    features: Any = tfds.features.FeaturesDict(kinds)

    def serialize(records: FolderRecords, index: int) -> bytes:
        data, label = records.read(index)
        file_name = os.fsencode(os.path.relpath(records.name(index), records.root))
        record = features.serialize_example({"image": io.BytesIO(data), "label": label, "file_name": file_name})
        # TFDS writes fields in random order. Parsing and writing the record again makes the order fixed.
        return proto.Example.FromString(record).SerializeToString(deterministic=True)

    with _replacing(out, _digest(splits.values(), shard)) as partial:
        name = "images_" + re.sub(r"[^a-z0-9]+", "_", out.resolve().name.lower()).strip("_")
        folder: Any = partial
        templates = {
            split: tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record")
            for split in splits
        }
        shards = {split: _divide(records, shard, templates[split]) for split, records in splits.items()}
        _write([*itertools.chain(*shards.values())], serialize, ArrayRecordWriter, partial, workers)
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part.indices) for part in parts],
                num_bytes=sum(part.path.stat().st_size for part in parts),
                filename_template=templates[split],
            )
            for split, parts in shards.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features, split_infos=infos, filename_template=templates["train"], check_data=False
        )


def write_digits(out: Path) -> None:
    """Write scikit-learn's handwritten digits as JPEG files of 32×32 pixels: `train/3/0017.jpg`, `val/3/0002.jpg`."""
    dataset = load_digits(Data())
    with _replacing(out, "digits") as partial:
        for split, source in (("train", dataset.train), ("val", dataset.test)):
            assert isinstance(source, ArraySource)
            for number, (image, label) in enumerate(zip(source.images, source.labels, strict=True)):
                path = partial / split / dataset.classes[label] / f"{number:04}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, quality=95)


def _in_own_words(message: str) -> str:
    """Replace the names of the trainer's fields by those of the arguments here."""
    for theirs, ours in (("--data.val-fraction", "--val-fraction"), ("data.val_fraction", "--val-fraction"), ("data.dir", "SRC")):
        message = message.replace(theirs, ours)
    return message


def _divide(records: FolderRecords, shard: int, template: Any) -> list[Shard]:
    """Return the files of a split, of `shard` images each."""
    starts = range(0, len(records), shard)
    paths = map(Path, template.sharded_filepaths(num_shards=len(starts)))
    return [Shard(path, records, range(len(records))[i : i + shard]) for path, i in zip(paths, starts, strict=True)]


def _write(
    shards: list[Shard], serialize: Callable[[FolderRecords, int], bytes], open_writer: Any, partial: Path, workers: int
) -> None:
    """Write the missing files, each completely or not at all."""
    stop = threading.Event()

    def write(shard: Shard) -> None:
        unfinished = shard.path.with_name(f"{shard.path.name}.unfinished")
        writer = open_writer(str(unfinished), "group_size:1,uncompressed")  # image files do not compress further
        for index in shard.indices:
            if stop.is_set():
                break
            writer.write(serialize(shard.records, index))
            progress.update()
        writer.close()
        if not stop.is_set():
            unfinished.replace(shard.path)

    missing = [shard for shard in shards if not shard.path.exists()]
    images, left = (sum(len(shard.indices) for shard in some) for some in (shards, missing))
    bar = tqdm(total=images, initial=images - left, unit="img", unit_scale=True)
    with bar as progress, ThreadPoolExecutor(workers) as pool:
        try:
            for future in wait([pool.submit(write, shard) for shard in missing], return_when=FIRST_EXCEPTION).done:
                future.result()
        except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
            raise ConfigError(f"{error}. Finished files are kept in {partial}; the same command continues") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _check_names(classes: Iterable[str]) -> None:
    """Refuse class names that TFDS's file of names would change: it holds one stripped line of UTF-8 for each."""
    for name in classes:
        if name != name.strip() or name.splitlines() != [name] or name.encode(errors="replace").decode() != name:
            raise ConfigError(
                f"SRC: a data set cannot keep the class name {name!r}, only one line of UTF-8 text without spaces around it: "
                "rename its folder"
            )


def _digest(splits: Iterable[FolderRecords], shard: int) -> str:
    """Return a hash of the names of all images and of the number of images per file."""
    digest = hashlib.sha256(str(shard).encode())
    for records in splits:
        digest.update("\0".join((*records.classes, "", *records.folders)).encode("utf-8", "surrogateescape"))
        for numbers in (records.names, records.offsets, records.starts):
            digest.update(numbers.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(out: Path, plan: str) -> Iterator[Path]:
    """Yield the folder `OUT.partial`, new or with the same plan, locked, and rename it to `out` at the end."""
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another place, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    with locked_folder(partial, "OUT"):
        try:
            started = partial / PLAN
            if any(path.name != LOCK for path in partial.iterdir()) and not (started.exists() and started.read_text() == plan):
                raise ConfigError(f"{partial} exists already, started with other images: remove it")
            started.write_text(plan)
            yield partial
            partial.rename(out)
            for name in (PLAN, LOCK):
                (out / name).unlink()
        except OSError as error:
            raise ConfigError(f"cannot write to {partial}: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 (a mistake in the command or in the images) or 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(
        prog="python -m train.prepare",
        description="Convert a folder of image files to a data set of TensorFlow Datasets in array_record. "
        "You can stop it at any time; the same command continues.",
    )
    parser.add_argument("source", nargs="?", metavar="SRC", help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("out", metavar="OUT", help="folder of the data set; must not exist")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)")
    parser.add_argument(
        "--val-fraction", type=float, default=0, help="part of each class to test on, for SRC/CLASS/IMAGE without train and val"
    )
    parser.add_argument(
        "--digits", action="store_true", help="instead of SRC: write scikit-learn's handwritten digits as JPEG files"
    )
    mend_streams()
    arguments = parser.parse_args(argv)
    if arguments.digits == bool(arguments.source):
        parser.error("give SRC and OUT, or --digits and OUT")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, found {arguments.workers}")
    if not 0 <= arguments.val_fraction < 1:
        parser.error(f"--val-fraction must be at least 0 and under 1, found {arguments.val_fraction:g}")
    try:
        out = local_path(arguments.out, "OUT")
        check_utf8(out, "OUT")
        if arguments.digits:
            write_digits(out)
        else:
            source = str(local_path(arguments.source, "SRC"))
            prepare_folder(source, out, workers=arguments.workers, val_fraction=arguments.val_fraction)
    except (ConfigError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
        return 130
    name = "folder" if arguments.digits else "tfds"
    print(f"Wrote {out}. To train on it: python -m train.main --data.name {name} --data.dir {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
