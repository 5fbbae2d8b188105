"""Index of as many files as ImageNet has: time to make it, time to load it, and memory.

`python -m benchmarks.index [FILES]` makes 1.28 million empty files in a temporary folder and removes them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import record, table

IMAGES, TEST_IMAGES, CLASSES = 1_281_167, 50_000, 1000

OPEN = """
import resource, sys, time
from train.config import Data
start = time.perf_counter()
from train.data.datasets import load_dataset
dataset = load_dataset(Data(name="folder", dir=sys.argv[1], image_size=224))
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(dataset.train) + len(dataset.test))
"""


def fill(root: Path, images: int) -> None:
    """Make files with names like ImageNet's (`n01440764/n01440764_10026.JPEG`), as hard links to one empty file per class."""
    for label in range(CLASSES):
        folder = root / f"n{1440764 + 7 * label:08}"
        folder.mkdir(parents=True)
        first = folder / f"{folder.name}_0.JPEG"
        first.touch()
        for image in range(1, len(range(label, images, CLASSES))):
            os.link(first, folder / f"{folder.name}_{image}.JPEG")


def open_once(root: Path, cache: Path) -> tuple[float, float, int]:
    """Open the data set in a fresh process; return seconds, GiB and the number of images."""
    command = [sys.executable, "-c", OPEN, str(root)]
    environment = os.environ | {"SCCONV_JAX_CACHE": str(cache)}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return float(found[0]), int(found[1]) / 2**20, int(found[2])


def main(images: int = IMAGES) -> None:
    folder = Path(tempfile.mkdtemp(prefix="index-"))
    try:
        print(f"making {images + TEST_IMAGES:,} files ...", flush=True)
        fill(folder / "set" / "train", images)
        fill(folder / "set" / "val", TEST_IMAGES)
        time.sleep(2.5)  # an index of folders that have only just changed is not kept
        rows = []
        for name in ("first time", "second time"):
            seconds, memory, count = open_once(folder / "set", folder / "cache")
            if count != images + TEST_IMAGES:
                raise AssertionError(f"{count} images indexed, {images + TEST_IMAGES} made")
            rows.append((name, f"{seconds:.1f}", f"{memory:.2f}"))
    finally:
        shutil.rmtree(folder)
    record(
        "index",
        "Opening a folder of ImageNet's size",
        f"{images + TEST_IMAGES:,} files in {CLASSES} classes, names like ImageNet's, in the file system's cache. "
        "Seconds include the imports of the data set's code; memory is the largest of the whole process.\n\n"
        + table(("", "seconds", "GiB"), rows),
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
