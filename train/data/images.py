"""From the bytes of an image file to the pixels that a network sees: uint8, RGB.

Evaluation is torchvision's `Resize(resize)` and `CenterCrop(size)` on PIL images, bit for bit: published accuracies depend on it.

Training is torchvision's `RandomResizedCrop(size)`, the box by the same rule. Differences, for speed: a JPEG that is much larger
than needed is decoded at a half, quarter or eighth of its size (never so that the box falls below `size`), no further down
than the box reaches, by libjpeg's fast variants; and the bilinear resize looks at the nearest pixels without smoothing, as
TensorFlow's does.

A palette is resolved, transparency dropped and CMYK converted as PIL does. Of 16 bits the upper eight are kept; PIL clips.
"""

import io
import math
import threading
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from train.data.batches import UnreadableImageError

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""

JPEG = b"\xff\xd8\xff"
"""How every JPEG file begins."""

END_OF_JPEG = b"\xff\xd9"
"""How a JPEG file ends that is whole."""

SEQUENTIAL = (b"\xff\xc0", b"\xff\xc1")
"""Marker of the frame's header where a single pass over the file makes all rows, from top to bottom."""

BEFORE_FRAME = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
"""Markers of tables, applications' data and comments."""

ROWS = 16
"""Rows that most files code together: less cannot be left out. Twice the largest factor of scaled decoding."""

LARGEST = 2**28
"""Pixels of a resized image: a gigabyte. A line of 1 × 60,000 pixels would take sixteen."""

cv2.setNumThreads(1)  # images are read in threads of our own


def random_resized_crop(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    exif: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A random part of an image, resized.

    Args:
        data: the file.
        size: height and width of the result.
        rng: decides the part.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width over height.
        exif: turn the image the way its EXIF orientation says. PyTorch's `ImageFolder` does not.
        out: array to write to, uint8 (size, size, 3), contiguous; by default a new one.

    Returns:
        uint8 (size, size, 3).

    Raises:
        UnreadableImageError: the file is damaged, truncated or no image.
    """

    def box_of(height: int, width: int) -> Box:
        return crop_box(height, width, rng, scale, ratio)

    crop = None
    if data.startswith(JPEG) and not (exif and _is_turned(data)):
        crop = _decode_jpeg(data, size, box_of)
    if crop is None:
        pixels = np.asarray(decode(data, exif=exif))
        crop = _part(pixels, *box_of(*pixels.shape[:2]))
    # Bilinear looks at the two nearest pixels, which covers all of them only while the crop is less than twice as large.
    shrinks = min(crop.shape[:2]) >= 2 * size
    return cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def center_crop(data: bytes, size: int, resize: int, *, exif: bool = False) -> np.ndarray:
    """The middle of an image whose shorter side was resized to `resize`: torchvision's evaluation, bit for bit.

    Args:
        data: the file.
        size: height and width of the result, at most `resize`.
        resize: of the shorter side; the longer one is rounded down.
        exif: turn the image the way its EXIF orientation says. PyTorch's `ImageFolder` does not.

    Returns:
        uint8 (size, size, 3).

    Raises:
        UnreadableImageError: the file is damaged, truncated or no image, or it is so long that it would not fit in memory.
    """
    image = decode(data, exif=exif)
    width, height = image.size
    if min(width, height) != resize:
        longer = int(resize * max(width, height) / min(width, height))
        if longer * resize > LARGEST:
            raise UnreadableImageError(f"{width} × {height} pixels, which would be {longer} × {resize} when resized")
        width, height = (resize, longer) if width <= height else (longer, resize)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode(data: bytes, *, exif: bool = False) -> Image.Image:
    """The whole image, RGB, by PIL.

    Raises:
        UnreadableImageError: the file is damaged, truncated or no image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        sixteen = image.format in ("PNG", "PPM")  # what these hold in mode I
        if exif:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or (image.mode == "I" and not sixteen):
            raise UnreadableImageError(f"pixels of 32 bits (mode {image.mode}); convert the image to 8 bits")
        if image.mode.startswith("I"):  # PIL would clip to 255 what has 16 bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image.info.pop("transparency", None)
        return image.convert("RGB")
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # of every kind: OSError, SyntaxError, struct.error and more, as the format has it
        raise UnreadableImageError(_reason(error)) from error


def crop_box(height: int, width: int, rng: np.random.Generator, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """A random part of an image, by the rule of torchvision's `RandomResizedCrop`.

    Area uniform in `scale`, ratio log-uniform in `ratio`; after ten that do not fit, the largest central part of a valid ratio.
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


def _decode_jpeg(data: bytes, size: int, box_of: Callable[[int, int], Box]) -> np.ndarray | None:
    """The part of a JPEG that `box_of(height, width)` asks for, scaled down as far as `size` allows; None: PIL must decide.

    It lies in memory that the next call of this thread uses again.
    """
    try:
        header = simplejpeg.decode_jpeg_header(data)
        height, width, colors = int(header[0]), int(header[1]), header[2]
        if colors not in ("YCbCr", "Gray", "RGB"):
            return None
        box = box_of(height, width)
        factor = next(factor for factor in (8, 4, 2, 1) if factor == 1 or min(box[2:]) >= factor * size)
        shortened, height = _shorten(data, height, box[0] + box[2])
        height, width = -(-height // factor), -(-width // factor)
        pixels = simplejpeg.decode_jpeg(
            shortened,
            strict=shortened is data,  # what follows the rows that are left is reported, though not as an error
            fastdct=True,
            fastupsample=True,
            min_factor=factor,
            min_height=height,
            min_width=width,
            buffer=_buffer(height * width * 3),
        )
    except (ValueError, LookupError):  # damaged, or merely odd: 4:4:1 is a KeyError
        return None
    return _part(pixels, *(round(side / factor) for side in box))


def _shorten(data: bytes, height: int, bottom: int) -> tuple[bytes | bytearray, int]:
    """A JPEG of `height` rows without most of those from row `bottom` on, and how many rows it has now.

    Its header alone is changed: a decoder stops where that says, a seventh of the way before the end on average.
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
    """At least `size` bytes, this thread's own, used again and again: fresh memory costs a tenth of the decoding."""
    if len(getattr(_own, "buffer", b"")) < size:
        _own.buffer = bytearray(size)
    return _own.buffer


def _part(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    return pixels[top : top + height, left : left + width]


def _is_turned(data: bytes) -> bool:
    """Whether the EXIF orientation is another than upright."""
    try:
        return Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return False  # whoever decodes it will say more


def _reason(error: Exception) -> str:
    """What PIL says, without the address of our buffer."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(error) or type(error).__name__
