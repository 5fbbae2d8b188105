"""Random crops of image files for training: uint8, RGB.

This is torchvision's `RandomResizedCrop(size)`; the crop box follows the same rule. Differences, for speed: a JPEG much larger
than needed is decoded at a half, quarter or eighth of its size (with the box at least `size`), only down to the last row of the
box, and with libjpeg's fast variants. The bilinear resize uses the nearest pixels without smoothing, as TensorFlow does.

Test images are prepared by `scconv_jax.images`, which also decodes all files that are not ordinary JPEGs.
"""

import io
import math
import threading
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

import scconv_jax

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""
JPEG = b"\xff\xd8\xff"
"""First bytes of every JPEG file."""
END_OF_JPEG = b"\xff\xd9"
"""Last bytes of a complete JPEG file."""
SEQUENTIAL = (b"\xff\xc0", b"\xff\xc1")
"""Frame-header markers of JPEGs that store all rows in one pass, from top to bottom."""
BEFORE_FRAME = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
"""Markers of tables, application data and comments."""
ROWS = 16
"""Most files code this many rows together, so the height is cut to a multiple of it. Twice the largest decoding factor."""

cv2.setNumThreads(1)  # the trainer already reads images in several threads


def random_resized_crop(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    exif: bool = False,
    max_pixels: int = scconv_jax.images.MAX_PIXELS,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a random part of an image file and resize it to uint8 (size, size, 3).

    Args:
        data: Bytes of the file.
        size: Height and width of the result, in pixels.
        rng: Random generator for the crop box.
        scale: Smallest and largest area of the crop, as a fraction of the image.
        ratio: Smallest and largest width divided by height.
        exif: Whether to rotate the image by its EXIF orientation.
        max_pixels: Limit on the pixels of the image.
        out: Contiguous array to write to. If None, a new one.

    Raises:
        scconv_jax.images.ImageError: The file is damaged, truncated, not an image, or too large.
    """

    def box_of(height: int, width: int) -> Box:
        return crop_box(height, width, rng, scale, ratio)

    crop = None
    if data.startswith(JPEG) and not (exif and _is_rotated(data)):
        crop = _decode_jpeg(data, size, box_of, max_pixels)
    if crop is None:
        pixels = np.asarray(scconv_jax.images.decode(data, exif=exif, max_pixels=max_pixels))
        crop = _cut(pixels, *box_of(*pixels.shape[:2]))
    # Bilinear uses the two nearest pixels, so it would skip some at a factor of two or more.
    shrinks = min(crop.shape[:2]) >= 2 * size
    return cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def crop_box(height: int, width: int, rng: np.random.Generator, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """Draw a part of an image by the rule of torchvision's `RandomResizedCrop`.

    The area is uniform in `scale`, the ratio log-uniform in `ratio`. After ten boxes that do not fit, the result is the largest
    central box with a valid ratio.
    """
    for _ in range(10):
        area = height * width * float(rng.uniform(scale[0], scale[1]))
        aspect = math.exp(float(rng.uniform(math.log(ratio[0]), math.log(ratio[1]))))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _decode_jpeg(data: bytes, size: int, box_of: Callable[[int, int], Box], max_pixels: int) -> np.ndarray | None:
    """Decode the part of a JPEG in `box_of(height, width)`, scaled down as far as `size` allows.

    The result is a view into a buffer that this thread's next call overwrites. It is None if only PIL can read the file,
    or if the file is too large.
    """
    try:
        header = simplejpeg.decode_jpeg_header(data)
        height, width, colors = int(header[0]), int(header[1]), header[2]
        if colors not in ("YCbCr", "Gray", "RGB") or height * width > max_pixels:
            return None
        box = box_of(height, width)
        factor = next(factor for factor in (8, 4, 2, 1) if factor == 1 or min(box[2:]) >= factor * size)
        shortened, height = _shorten(data, height, box[0] + box[2])
        height, width = -(-height // factor), -(-width // factor)
        pixels = simplejpeg.decode_jpeg(
            shortened,
            strict=shortened is data,  # libjpeg warns of the data after the last row of a shortened file
            fastdct=True,
            fastupsample=True,
            min_factor=factor,
            min_height=height,
            min_width=width,
            buffer=_buffer(height * width * 3),
        )
    except (ValueError, LookupError):  # damaged or rare: 4:4:1 raises a KeyError
        return None
    return _cut(pixels, *(round(side / factor) for side in box))


def _shorten(data: bytes, height: int, bottom: int) -> tuple[bytes | bytearray, int]:
    """Return a JPEG of `height` rows without most of the rows from `bottom` on, and its new number of rows.

    Only the height in the header changes, and the decoder stops there. This saves a seventh of the decoding on average.
    """
    height_left = min(height, -(-bottom // ROWS) * ROWS)
    at = 2
    while height_left < height and data.endswith(END_OF_JPEG) and data[at] == 0xFF and data[at + 1] in BEFORE_FRAME:
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at : at + 2] in SEQUENTIAL:  # marker, two bytes of length, one of precision, two of height
            shortened = bytearray(data)
            shortened[at + 5 : at + 7] = height_left.to_bytes(2)
            return shortened, height_left
    return data, height


_own = threading.local()


def _buffer(size: int) -> bytearray:
    """Return this thread's buffer of at least `size` bytes. New memory would cost a tenth of the decoding time."""
    if len(getattr(_own, "buffer", b"")) < size:
        _own.buffer = bytearray(size)
    return _own.buffer


def _cut(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    return pixels[top : top + height, left : left + width]


def _is_rotated(data: bytes) -> bool:
    """Return whether the EXIF orientation is not upright."""
    try:
        return Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return False  # decoding will say what is wrong
