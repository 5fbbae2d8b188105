"""Sources that decode image files, crop them for training or testing, and count unreadable ones."""

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

import scconv_jax
from train.config import ConfigError, Data
from train.data.batches import UnreadableImageError
from train.data.images import random_resized_crop
from train.data.index import FolderRecords
from train.data.tfds import TfdsRecords

Records = FolderRecords | TfdsRecords
"""Encoded images with random access."""


class Unreadable:
    """Reports each unreadable image once, and ends the run if there are more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: list[str] = []
        self._lock = threading.Lock()

    def note(self, name: str, error: Exception) -> None:
        """Count an image; raise a `ConfigError` if it is one too many."""
        with self._lock:
            if name in self.names:
                return
            self.names.append(name)
            count = len(self.names)
        if count <= self.limit:
            tqdm.write(f"skipped unreadable image {name}: {error} ({count} of at most {self.limit})", file=sys.stderr)
            return
        names = scconv_jax.messages.listed(self.names)
        raise ConfigError(
            f"more than data.max_bad_images {self.limit} images cannot be read: {names} ({error}). "
            "Repair or remove them, or allow more (--data.max-bad-images)"
        )


@dataclass(frozen=True)
class EncodedSource:
    """A `train.data.batches.Source` of encoded images."""

    records: Records
    write_pixels: Callable[[bytes, tuple[int, ...], np.ndarray], object]
    """(bytes of a file, key, out): writes the image to `out`, uint8 (h, w, 3)."""
    image_shape: tuple[int, int, int]
    unreadable: Unreadable

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int, key: tuple[int, ...], out: np.ndarray) -> int:
        """Write the cropped image to `out`, uint8 (h, w, 3), and return its label. A random crop depends on `key`."""
        try:
            data, label = self.records.read(index)
            self.write_pixels(data, key, out)
            return label
        except (OSError, scconv_jax.images.ImageError, UnreadableImageError) as error:
            self.unreadable.note(self.records.name(index), error)
            raise UnreadableImageError(str(error)) from error


def make_sources(data: Data, resize: int, train: Records, test: Records) -> tuple[EncodedSource, EncodedSource]:
    """Make sources of training and test images of `data.image_size`, cropped as the config says; test images after a `resize`.

    PIL's limit on pixels and its warnings are switched off for the rest of the process.
    """
    Image.MAX_IMAGE_PIXELS = None  # `data.max_pixels` is the only limit
    warnings.filterwarnings("ignore", module="PIL")  # of images that it can read
    size, exif, max_pixels = data.image_size, data.exif, data.max_pixels
    unreadable = Unreadable(data.max_bad_images)

    def random_crop(image: bytes, key: tuple[int, ...], out: np.ndarray) -> None:
        rng = np.random.default_rng(key)
        crop = {"scale": data.crop_scale, "ratio": data.crop_ratio}
        random_resized_crop(image, size, rng, **crop, exif=exif, max_pixels=max_pixels, out=out)

    def central_crop(image: bytes, _key: tuple[int, ...], out: np.ndarray) -> None:
        decoded = scconv_jax.images.decode(image, exif=exif, max_pixels=max_pixels)
        out[...] = scconv_jax.images.center_crop(decoded, size, resize)

    def in_grey(write: Callable[[bytes, tuple[int, ...], np.ndarray], object]) -> Callable[..., None]:
        def write_grey(image: bytes, key: tuple[int, ...], out: np.ndarray) -> None:
            colours = np.empty((size, size, 3), np.uint8)
            write(image, key, colours)
            out[...] = scconv_jax.images.to_grey(colours)

        return write_grey

    shape = (size, size, data.channels)
    crops = (random_crop, central_crop) if data.channels == 3 else map(in_grey, (random_crop, central_crop))
    sources = [EncodedSource(*pair, shape, unreadable) for pair in zip((train, test), crops, strict=True)]
    return sources[0], sources[1]
