"""Images as a network expects them: decoded, resized, cropped and normalised.

This is torchvision's `Resize(resize)`, `CenterCrop(size)`, `ToTensor()` and `Normalize(mean, std)` on PIL images. The pixels
equal torchvision's bit for bit, because published accuracies depend on them. The trainer tests on exactly these images.

Difference: 16-bit grey images keep their upper 8 bits. PIL, and so torchvision, clips them to white.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from PIL import Image

OneImage: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | jax.Array"
"""A path, the bytes of an image file, a PIL image, or a uint8 array (h, w, 3)."""

MAX_PIXELS = 2**28
"""Default limit on the pixels of an image file: PIL needs a gigabyte for so many."""
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jfif", ".jpe", ".avif", ".avifs", ".jp2", ".j2k",
    ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".icb", ".vda", ".vst", ".apng", ".bw",
    ".cur", ".dcx", ".dds", ".dib", ".icns", ".ico", ".mpo", ".msp", ".pcx", ".psd", ".qoi", ".ras", ".rgb", ".rgba",
    ".sgi", ".xbm", ".xpm",
)  # fmt: skip
"""Suffixes of image files, in lower case: the formats that PIL decodes by itself, to 8 or 16 bits. The trainer has the same."""
PNG = b"\x89PNG\r\n\x1a\n"
"""First bytes of every PNG file."""
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Types of the PNG chunks whose length PIL limits. No pixel depends on them."""


class ImageError(ValueError):
    """An image cannot be decoded, or it would not fit in memory after resizing."""


@dataclass(frozen=True)
class Preparation:
    """Preparation of test images: resize, crop, normalise (torchvision's evaluation transform).

    Attributes:
        size: Height and width of the central crop, in pixels.
        resize: Length of the shorter side before the crop, in pixels; at least `size`.
        mean: Mean of each channel, subtracted from images in 0..1. A single one is that of grey images.
        std: Standard deviation of each channel; the result is divided by it.
        exif: Whether to rotate files and PIL images by their EXIF orientation.
    """

    size: int
    resize: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    exif: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"resize={self.resize} must be at least size={self.size}, and both must be positive.")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean={self.mean} and std={self.std} must have one value per channel, and std must be positive.")

    @property
    def channels(self) -> int:
        """Channels of the images: 3 for RGB, 1 for grey ones."""
        return len(self.mean)


def resize_for(size: int) -> int:
    """Return the usual length of the shorter side before a crop of `size`: 256 for 224, and in proportion."""
    return round(size * 256 / 224)


def prepare(images: OneImage | Iterable[OneImage], preparation: Preparation, *, exif: bool = False) -> np.ndarray:
    """Return the batch that a network expects, float32 (n, size, size, 3).

    `scconv_jax.prepare_images` also takes a network's name, and describes the arguments and errors.
    """
    batch: Any = [images] if is_single(images) else images
    preparation = replace(preparation, exif=preparation.exif or exif)
    crops = [pixels(image, preparation, f"images[{number}]") for number, image in enumerate(batch)]
    if not crops:
        raise ValueError("images is empty: there is nothing to prepare.")
    # Compiled code rounds differently (XLA multiplies by reciprocals), so the trainer's function, compiled, makes the 256 values
    # of each channel.
    mean, std = (tuple(map(float, values)) for values in (preparation.mean, preparation.std))
    levels = np.arange(256, dtype=np.uint8)[:, None].repeat(preparation.channels, axis=1)
    table = np.asarray(_compiled_normalize(levels, mean=mean, std=std))
    return table[np.stack(crops), np.arange(preparation.channels)]


def is_single(images: object) -> bool:
    """Return whether this is one image: no array (n, h, w, 3), and nothing else that can be iterated over."""
    one = isinstance(images, str | os.PathLike | bytes | bytearray) or getattr(images, "ndim", 4) != 4
    return one or not isinstance(images, Iterable)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Return uint8 images (..., c) as float32: scaled to 0..1, minus `mean`, divided by `std` (torchvision's `Normalize`)."""
    scaled = images.astype(jnp.float32) / 255
    shape = (1,) * (images.ndim - 1) + (-1,)
    return (scaled - jnp.asarray(mean, jnp.float32).reshape(shape)) / jnp.asarray(std, jnp.float32).reshape(shape)


_compiled_normalize = jax.jit(normalize, static_argnames=("mean", "std"))


def center_crop(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """Resize the shorter side of an RGB image to `resize` and cut out the middle, as torchvision does.

    Args:
        image: The image.
        size: Height and width of the crop, at most `resize`.
        resize: New length of the shorter side. The longer side is rounded down.

    Returns:
        uint8 (size, size, 3).
    """
    from PIL import Image

    width, height = image.size
    if min(width, height) != resize:
        longer = int(resize * max(width, height) / min(width, height))
        if longer * resize > MAX_PIXELS:
            image = _middle(image, resize)
            width, height = image.size
            longer = int(resize * max(width, height) / min(width, height))
        width, height = (resize, longer) if width <= height else (longer, resize)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _middle(image: Image.Image, resize: int) -> Image.Image:
    """Cut off both ends of a long, thin image, as far as no square in its middle depends on them.

    Resized whole, 1 × 60,000 pixels would be four billion.
    """
    short, long = sorted(image.size)
    needed = short + 4 * max(1, math.ceil(short / resize))  # with what the filter reaches
    step = 2 * short // math.gcd(short, resize)  # an even number of pixels of the resized image, for the same rounding
    cut = max(0, long - needed) // 2 // step * step
    left, top = (cut, 0) if image.width == long else (0, cut)
    return image.crop((left, top, image.width - left, image.height - top))


def decode(data: bytes, *, exif: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to an RGB image.

    Args:
        data: Bytes of the file.
        exif: Whether to rotate the image by its EXIF orientation. PyTorch's `ImageFolder` does not.
        max_pixels: Limit on the pixels of the image. PIL's own, `PIL.Image.MAX_IMAGE_PIXELS`, also holds; the trainer lifts it.

    Raises:
        ImageError: The file is damaged, truncated, not an image, or too large.
    """
    from PIL import Image

    try:
        brand = ascii(data[8:12].decode("latin-1"))[1:-1]  # of AVIF and HEIC files, whatever their suffix
        with _image_errors(
            f"an image of type {brand}, which this Pillow cannot read" if data[4:8] == b"ftyp" else "not an image"
        ):
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} × {image.height} pixels, more than max_pixels {max_pixels:,}")
        return to_rgb(image, exif=exif)
    except ImageError:
        without = _without_text(data)
        if without == data:
            raise
        return decode(without, exif=exif, max_pixels=max_pixels)


def to_rgb(image: Image.Image, *, exif: bool = False) -> Image.Image:
    """Convert a PIL image of any mode to RGB: drop transparency, and keep the upper 8 of 16 bits.

    Raises:
        ImageError: Its file is damaged or truncated, or its pixels have 32 bits.
    """
    from PIL import Image, ImageOps

    with _image_errors():
        sixteen_bits = image.format in ("PNG", "PPM")  # what these formats hold in mode I
        if exif:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or (image.mode == "I" and not sixteen_bits):
            raise ImageError(f"pixels of 32 bits (mode {image.mode}); convert the image to 8 bits")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.copy()  # the caller's image keeps its transparency
            del image.info["transparency"]
        return image.convert("RGB")


def _without_text(data: bytes) -> bytes:
    """Return a PNG file without the chunks of `PNG_TEXT`, and any other file as it is."""
    if not data.startswith(PNG):
        return data
    kept, start = [PNG], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])  # length, type, contents, checksum
        if data[start + 4 : start + 8] not in PNG_TEXT:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


@contextlib.contextmanager
def _image_errors(unknown: str = "not an image") -> Iterator[None]:
    """Turn PIL's errors, which differ by image format, into `ImageError`; `unknown` is the message about an unknown format."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except (MemoryError, ImageError):
        raise
    except UnidentifiedImageError as error:  # PIL's text is the address of our buffer
        raise ImageError(unknown) from error
    except Exception as error:  # OSError, SyntaxError, struct.error and others
        raise ImageError(str(error) or type(error).__name__) from error


def pixels(image: OneImage, preparation: Preparation, name: str = "the image") -> np.ndarray:
    """Return the pixels of one image before they are normalised: resized and cropped.

    Args:
        image: The image.
        preparation: How to prepare it.
        name: What errors call an image that is no path.

    Returns:
        uint8 (size, size, channels).

    Raises:
        ImageError: The image cannot be decoded.
        OSError: The file cannot be opened.
        TypeError: The image has another type.
        ValueError: An array has another shape, or the preparation has neither 3 channels nor 1.
        ModuleNotFoundError: Pillow is not installed.
    """
    if preparation.channels not in (1, 3):
        raise ValueError(f"The network takes images of {preparation.channels} channels; image files give 3 (RGB) or 1 (grey).")
    exif = preparation.exif
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError("Preparing images needs Pillow: pip install 'scconv-jax[images]'") from error

    try:
        if isinstance(image, np.ndarray | jax.Array):
            image = Image.fromarray(_checked(np.asarray(image), name))
        elif isinstance(image, str | os.PathLike):
            name = os.fspath(image)
            with open(name, "rb") as file:
                image = decode(file.read(), exif=exif)
        elif isinstance(image, bytes | bytearray | memoryview):
            image = decode(bytes(image), exif=exif)
        elif isinstance(image, Image.Image):
            image = to_rgb(image, exif=exif)
        else:
            found = type(image).__name__
            raise TypeError(f"{name} is of type {found}; expected a path, bytes, a PIL image or a uint8 array (h, w, 3).")
        crop = center_crop(image, preparation.size, preparation.resize)
    except ImageError as error:
        raise ImageError(f"{name} cannot be read: {error}") from error
    return crop if preparation.channels == 3 else to_grey(crop)


def to_grey(crop: np.ndarray) -> np.ndarray:
    """Return RGB pixels, uint8 (h, w, 3), as grey ones, uint8 (h, w, 1): PIL's mode L, 0.299 R + 0.587 G + 0.114 B."""
    from PIL import Image

    return np.asarray(Image.fromarray(crop).convert("L"))[..., None]


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """Return `array` if it is uint8 (h, w, 3); raise an error if it is not."""
    expected = "expected uint8 (h, w, 3) with values 0 to 255"
    found = f"{name} is an array of {array.dtype} with shape {array.shape}; {expected}"
    if array.dtype != np.uint8:
        advice = " For values in 0..1, pass np.uint8(np.round(255 * array))." if array.dtype.kind == "f" else ""
        raise TypeError(f"{found}.{advice}")
    if array.ndim == 3 and array.shape[2] == 3 and array.size:
        return array
    advice = ""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        advice = " It has its channels first: pass array.transpose(1, 2, 0)."
    elif array.ndim == 3 and array.shape[2] == 4:
        advice = " For RGBA, pass array[..., :3]."
    elif array.ndim == 2 or array.shape[2:] == (1,):
        advice = " Repeat a grey image to three channels."
    raise ValueError(f"{found}.{advice}")
