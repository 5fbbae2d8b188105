"""Image files as sources: read at random access, decoded as training or evaluation asks, the unreadable ones counted."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from train.config import ConfigError, Data
from train.data.batches import Records, UnreadableImageError
from train.data.images import center_crop, random_resized_crop


class Unreadable:
    """Names each image that cannot be read, once, and ends the run at the first over the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: list[str] = []
        self._lock = threading.Lock()

    def note(self, name: str, error: Exception) -> None:
        """Count an image.

        Raises:
            ConfigError: there are more than the limit.
        """
        with self._lock:
            if name in self.names:
                return
            self.names.append(name)
            count = len(self.names)
        if count <= self.limit:
            tqdm.write(f"skipped unreadable image {name}: {error} ({count} of at most {self.limit})", file=sys.stderr)
            return
        shown = ", ".join(self.names[:10]) + (f" and {count - 10} more" if count > 10 else "")
        raise ConfigError(
            f"more than data.max_bad_images {self.limit} images cannot be read: {shown} ({error}). "
            "Mend or remove them, or allow more (--data.max-bad-images)"
        )


@dataclass(frozen=True)
class EncodedSource:
    """A `train.batches.Source` of encoded images."""

    records: Records
    write_pixels: Callable[[bytes, tuple[int, ...], np.ndarray], object]
    """(file, key, out): writes the image to `out`, uint8 (h, w, 3)."""
    image_shape: tuple[int, int, int]
    unreadable: Unreadable

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int, key: tuple[int, ...], out: np.ndarray) -> int:
        """Write the image, cropped at random by `key` or centrally, to `out`, uint8 (h, w, 3); returns its label.

        Raises:
            UnreadableImageError: it cannot be read; noted.
            ConfigError: more than the allowed number cannot be read.
        """
        try:
            data, label = self.records.read(index)
            self.write_pixels(data, key, out)
            return label
        except (OSError, UnreadableImageError) as error:
            self.unreadable.note(self.records.name(index), error)
            raise UnreadableImageError(str(error)) from error


def make_sources(data: Data, train: Records, test: Records) -> tuple[EncodedSource, EncodedSource]:
    """Training and test images of `data.image_size`, cropped as the config says."""
    size, exif = data.image_size, data.exif
    resize = data.resize or round(size * 256 / 224)
    unreadable = Unreadable(data.max_bad_images)

    def write_part(image: bytes, key: tuple[int, ...], out: np.ndarray) -> None:
        rng = np.random.default_rng(key)
        random_resized_crop(image, size, rng, scale=data.crop_scale, ratio=data.crop_ratio, exif=exif, out=out)

    def write_middle(image: bytes, key: tuple[int, ...], out: np.ndarray) -> None:
        del key
        out[...] = center_crop(image, size, resize, exif=exif)

    shape = (size, size, 3)
    return EncodedSource(train, write_part, shape, unreadable), EncodedSource(test, write_middle, shape, unreadable)
