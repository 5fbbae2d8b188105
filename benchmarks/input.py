"""Rate of reading images, beside torch's DataLoader and tf.data; and the time that a step waits for its data.

tf.data is measured if TensorFlow is installed here, or with the Python interpreter that `TENSORFLOW_PYTHON` names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from benchmarks.timing import alternate, ratio, record, table
from train.config import Data
from train.data.batches import DevicePrefetcher, train_batches
from train.data.datasets import load_dataset
from train.data.images import crop_box
from train.run.metrics import MetricsWindow

IMAGES, BATCH, SIZE, WORKERS = 768, 64, 224, 2
ROUNDS = 5

TF_DATA = """
import glob, sys, time
import tensorflow as tf

def load(path):
    data = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(data), tf.zeros([1, 0, 4]), aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0),
        max_attempts=10, min_object_covered=0.0, use_image_if_no_bounding_boxes=True)
    image = tf.image.decode_and_crop_jpeg(data, tf.concat([begin[:2], size[:2]], 0), channels=3)
    image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE)))
    return tf.cast(image, tf.uint8)

files = sorted(glob.glob(sys.argv[1] + "/train/*/*.jpg"))
options = tf.data.Options()
options.threading.private_threadpool_size = WORKERS
epoch = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).map(load, num_parallel_calls=tf.data.AUTOTUNE)
epoch = epoch.batch(BATCH, drop_remainder=True).prefetch(2).with_options(options)
for _ in sys.stdin:
    start = time.perf_counter()
    assert sum(len(batch) for batch in epoch) == len(files)
    print(time.perf_counter() - start, flush=True)
"""


def photo(rng: np.random.Generator, height: int = 375, width: int = 500) -> np.ndarray:
    """Return noise with the spectrum of photographs: uint8 (h, w, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    noise = np.fft.irfft2(spectrum / frequency**1.2, (height, width))
    luma, red, blue = noise / noise.std((1, 2), keepdims=True)
    pixels = np.stack([luma + 0.3 * red, luma - 0.1 * red - 0.1 * blue, luma + 0.3 * blue], axis=-1)
    return np.clip(118 + 50 * pixels, 0, 255).astype(np.uint8)


def write_photos(root: Path) -> float:
    """Write `IMAGES` JPEG files of quality 90 in two classes; return their mean size in kB."""
    rng, sizes = np.random.default_rng(0), []
    for split, count in (("train", IMAGES), ("val", 2)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(rng)).save(path, quality=90)
            sizes.append(path.stat().st_size)
    return sum(sizes) / len(sizes) / 1e3


def ours(root: Path) -> Callable[[], None]:
    """Return a function that reads an epoch of the trainer's batches and flips on the host, as the others do."""
    source = load_dataset(Data(name="folder", dir=str(root), image_size=SIZE)).train
    rng = np.random.default_rng(0)

    def epoch() -> None:
        batches = train_batches(source, BATCH, seed=0, first_step=0, threads=WORKERS)
        for _ in range(IMAGES // BATCH):
            for image in next(batches)["image"]:
                if rng.random() < 0.5:
                    cv2.flip(image, 1, dst=image)
        batches.close()

    return epoch


class Photos(torch.utils.data.Dataset):
    """`ImageFolder` with `RandomResizedCrop(224)` and `RandomHorizontalFlip()`, by PIL."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(root.glob("train/*/*.jpg"))
        self.rng = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        top, left, height, width = crop_box(image.height, image.width, self.rng, (0.08, 1.0), (3 / 4, 4 / 3))
        image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if self.rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def data_loader(root: Path) -> Callable[[], None]:
    """Return a function that reads an epoch with torch's DataLoader, whose processes persist."""
    loader = torch.utils.data.DataLoader(
        Photos(root), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, multiprocessing_context="forkserver"
    )

    def epoch() -> None:
        assert sum(len(batch) for batch in loader) == IMAGES

    return epoch


def tf_data(python: str, root: Path) -> tuple[subprocess.Popen[str], Callable[[], None]]:
    """Start a process for tf.data; return it and a function that makes it read an epoch."""
    constants = f"SIZE, BATCH, WORKERS = {SIZE}, {BATCH}, {WORKERS}\n"
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [python, "-c", constants + TF_DATA, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=quiet,
    )
    to, back = process.stdin, process.stdout
    assert to is not None
    assert back is not None

    def epoch() -> None:
        print("go", file=to, flush=True)
        if not back.readline():
            raise RuntimeError(f"tf.data failed in {python}")

    return process, epoch


def rates() -> str:
    """Return a table of images per second, and of our rate over theirs, epoch by epoch."""
    with tempfile.TemporaryDirectory(prefix="photos-") as folder:
        root = Path(folder)
        size = write_photos(root)
        functions = {"ours": ours(root), "torch DataLoader": data_loader(root)}
        process, python = None, os.environ.get("TENSORFLOW_PYTHON")
        if python or importlib.util.find_spec("tensorflow"):
            process, functions["tf.data"] = tf_data(python or sys.executable, root)
        try:
            seconds = alternate(functions, ROUNDS)
        finally:
            if process is not None:
                process.kill()
                process.wait()
    rows = [
        (name, f"{IMAGES / np.median(times):,.0f}", "" if name == "ours" else ratio(times, seconds["ours"]))
        for name, times in seconds.items()
    ]
    without = "" if process is not None else " TensorFlow is not installed here: tf.data was not measured."
    return (
        f"JPEG files of 500×375 pixels, quality 90, {size:.0f} kB on average, in the file system's cache: decode, random crop "
        f"resized to {SIZE}, random flip, batches of {BATCH}; {WORKERS} threads, of the DataLoader {WORKERS} processes. "
        f"Epochs of {IMAGES} images in turn, medians of {ROUNDS}. Nothing is copied to a device.{without}\n\n"
        + table(("", "images/s", "ours is faster by (least to greatest)"), rows)
    )


def overlap(steps: int = 150, step_seconds: float = 0.05) -> str:
    """Return a table: the share of its time that a loop like the trainer's waits for data, by the time to make a batch.

    Step and data sleep, as a host does while an accelerator or a disk works. So other load does not matter.
    """
    batch = {"image": np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)}

    def wait(loss: np.ndarray) -> np.ndarray:
        time.sleep(step_seconds)
        return loss

    @jax.jit
    def step(loss: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"loss": jax.pure_callback(wait, loss, loss + batch["image"][0, 0, 0, 0])}

    def run(seconds: float) -> tuple[float, float]:
        """Return the seconds per step, and the share of them spent waiting."""

        def batches() -> Iterator[dict[str, np.ndarray]]:
            while True:
                time.sleep(seconds)
                yield batch

        with DevicePrefetcher(batches(), jax.device_put) as prefetcher:
            values = jax.block_until_ready(step(jnp.float32(0), next(prefetcher)))
            window = MetricsWindow(BATCH, waited=lambda: prefetcher.waited)
            for number in range(steps):
                values = step(values["loss"], prefetcher.take(window.idle))
                window.add(number, values)
            found = window.close()
        return BATCH / found["images_per_second"], found["waiting_for_data"]

    rows = []
    for share in (0.5, 0.8, 0.9, 1.2):
        seconds, waiting = run(share * step_seconds)
        rows.append((f"{share:.1f}", f"{1e3 * seconds:.1f}", f"{waiting:.1%}"))
    return (
        f"{steps} steps of {1e3 * step_seconds:.0f} ms; to make a batch takes a share of that. Both sleep, as a host does while "
        "accelerator and disk work. As in training, two batches are transferred ahead, and the host runs two steps ahead.\n\n"
        + table(("data / step", "ms/step", "waiting for data"), rows)
    )


def main() -> None:
    record("input", "Reading images", f"{rates()}\n\n## Data beside the step\n\n{overlap()}")


if __name__ == "__main__":
    main()
