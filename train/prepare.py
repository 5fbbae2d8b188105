"""Prepare images for training: `python -m train.prepare SRC OUT`.

`SRC` is a folder of image files, `SRC/train/CLASS/IMAGE` and `SRC/val/CLASS/IMAGE`; `OUT` becomes a set as TensorFlow Datasets
keeps them, in array_record: few large files instead of very many small ones. The bytes of each image stay as they are.

Everything is written to `OUT.partial`, which becomes `OUT` at the end; started again, it goes on with the files still missing.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from train.config import ConfigError, Data
from train.data.datasets import ArraySource, load_digits
from train.data.folder import FolderRecords, open_folder

SHARD = 8192
"""Images per file: about a gigabyte of ImageNet."""
PLAN = "plan.txt"
"""Says what an unfinished set is made of: its files fit no other."""


@dataclass(frozen=True)
class Shard:
    """A file to write: images `[start, stop)` of a split."""

    path: Path
    records: FolderRecords
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def prepare_folder(source: str, out: Path, *, workers: int, shard: int = SHARD) -> None:
    """Write a folder of image files as a set of TensorFlow Datasets.

    Args:
        source: holds train/CLASS/IMAGE and val/CLASS/IMAGE.
        out: the set; must not exist.
        workers: threads that read and write.
        shard: images per file.

    Raises:
        ConfigError: the source is not such a folder, a file cannot be read or written, or `out` is there already.
        ModuleNotFoundError: TensorFlow Datasets or array_record is missing; says how to install it.
    """
    try:
        import importlib_resources  # noqa: F401  (TFDS needs it and does not say so)
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise ModuleNotFoundError(
            f"preparing a set needs {error.name or error}, which is not installed: pip install 'scconv-jax[train,tfds]'"
        ) from error

    try:
        splits = dict(zip(("train", "validation"), open_folder(source), strict=True))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.dir", "SRC")) from error
    _check_names(splits["train"].classes)
    partial: Any = _open_partial(out, splits.values(), shard)
    proto: Any = tf_example_pb2
    features: Any = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=splits["train"].classes),
            "file_name": tfds.features.Text(),
        }
    )
    name = "images_" + re.sub(r"[^a-z0-9]+", "_", out.resolve().name.lower()).strip("_")
    templates = {
        split: tfds.core.ShardedFileTemplate(data_dir=partial, dataset_name=name, split=split, filetype_suffix="array_record")
        for split in splits
    }
    shards = {
        split: [
            Shard(Path(path), records, i * shard, min((i + 1) * shard, len(records)))
            for i, path in enumerate(templates[split].sharded_filepaths(num_shards=-(-len(records) // shard)))
        ]
        for split, records in splits.items()
    }

    def serialize(records: FolderRecords, index: int) -> bytes:
        data, label = records.read(index)
        file_name = os.path.relpath(records.name(index), records.root)
        record = features.serialize_example({"image": io.BytesIO(data), "label": label, "file_name": os.fsencode(file_name)})
        # TFDS leaves the order of the fields to chance; the same images shall always be the same file.
        return proto.Example.FromString(record).SerializeToString(deterministic=True)

    _write([*itertools.chain(*shards.values())], serialize, ArrayRecordWriter, partial, workers)
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(part) for part in parts],
            num_bytes=sum(part.path.stat().st_size for part in parts),
            filename_template=templates[split],
        )
        for split, parts in shards.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=partial, features=features, split_infos=infos, filename_template=templates["train"], check_data=False
    )
    partial.rename(out)
    (out / PLAN).unlink()


def write_digits(out: Path) -> None:
    """Write the handwritten digits of scikit-learn as a folder of JPEG files, 32×32 pixels: `train/3/0017.jpg`, `val/3/0002.jpg`.

    Raises:
        ConfigError: `out` is there already, or cannot be written.
    """
    dataset = load_digits(Data())
    partial = _new_partial(out)
    for split, source in (("train", dataset.train), ("val", dataset.test)):
        assert isinstance(source, ArraySource)
        for number, (image, label) in enumerate(zip(source.images, source.labels, strict=True)):
            path = partial / split / dataset.classes[label] / f"{number:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
    partial.rename(out)


def _write(
    shards: list[Shard], serialize: Callable[[FolderRecords, int], bytes], writer_of: Any, partial: Path, workers: int
) -> None:
    """Write the files that are not there yet, each whole or not at all."""
    stop = threading.Event()

    def write(shard: Shard) -> None:
        unfinished = shard.path.with_name(f"{shard.path.name}.unfinished")
        writer = writer_of(str(unfinished), "group_size:1,uncompressed")  # images do not shrink any further
        for index in range(shard.start, shard.stop):
            if stop.is_set():
                break
            writer.write(serialize(shard.records, index))
            progress.update()
        writer.close()
        if not stop.is_set():
            unfinished.replace(shard.path)

    missing = [shard for shard in shards if not shard.path.exists()]
    total = sum(map(len, shards))
    with (
        tqdm(total=total, initial=total - sum(map(len, missing)), unit="img", unit_scale=True) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for future in wait([pool.submit(write, shard) for shard in missing], return_when=FIRST_EXCEPTION).done:
                future.result()
        except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
            raise ConfigError(f"{error}. What is done is kept in {partial}; start again to go on") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _check_names(classes: Iterable[str]) -> None:
    """The names must come back as they are from TFDS's file of them: a line of UTF-8 each, without spaces around it."""
    for name in classes:
        if name != name.strip() or name.splitlines() != [name] or name.encode(errors="replace").decode() != name:
            raise ConfigError(f"SRC: a set cannot keep the class name {name!r}, only UTF-8 text of one line: rename its folder")


def _open_partial(out: Path, splits: Iterable[FolderRecords], shard: int) -> Path:
    """The folder to write to: a new one, or one that was begun with the same images."""
    digest = hashlib.sha256(str(shard).encode())
    for records in splits:
        digest.update("\0".join((*records.classes, "", *records.folders)).encode("utf-8", "surrogateescape"))
        for numbers in (records.names, records.offsets, records.starts):
            digest.update(numbers.tobytes())
    plan = _partial(out) / PLAN
    with contextlib.suppress(OSError):
        if plan.read_text() == digest.hexdigest():
            return plan.parent
    _new_partial(out)
    plan.write_text(digest.hexdigest())
    return plan.parent


def _new_partial(out: Path) -> Path:
    """An empty folder, to become `out`."""
    partial = _partial(out)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except FileExistsError as error:
        raise ConfigError(f"{partial} is there already, begun with other images: remove it") from error
    except OSError as error:
        raise ConfigError(f"cannot write to {partial}: {error.strerror}") from error
    return partial


def _partial(out: Path) -> Path:
    """Where `out` is made."""
    if out.exists():
        raise ConfigError(f"{out} is there already: choose another place, or remove it")
    return out.with_name(f"{out.name}.partial")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns its exit code: 0; 2, a mistake in the command or in the images; 130, Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m train.prepare",
        description="Prepare a folder of image files as a set of TensorFlow Datasets in array_record. It can be stopped at any "
        "moment: the same command goes on.",
    )
    parser.add_argument("source", nargs="?", metavar="SRC", help="folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the set; must not exist")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)")
    parser.add_argument(
        "--digits", action="store_true", help="instead of SRC: write the handwritten digits of scikit-learn as JPEG files"
    )
    arguments = parser.parse_args(argv)
    if arguments.digits == bool(arguments.source):
        parser.error("give SRC and OUT, or --digits and OUT")
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, found {arguments.workers}")
    try:
        if arguments.digits:
            write_digits(arguments.out)
            print(f"Wrote {arguments.out}. To train on it: python -m train.main --data.name folder --data.dir {arguments.out}")
        else:
            prepare_folder(arguments.source, arguments.out, workers=arguments.workers)
            print(f"Wrote {arguments.out}. To train on it: python -m train.main --data.name tfds --data.dir {arguments.out}")
    except (ConfigError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
