"""Image files for tests: of every mode, turned, damaged, and JPEGs of every subsampling."""

import io

import numpy as np
from PIL import Image, PngImagePlugin


def photo(height, width, seed=0):
    """Return an image of smooth colours with noise: uint8 (h, w, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(small) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(pixels, kind="JPEG", **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


RED = np.full((20, 30, 3), (200, 40, 60), np.uint8)


def text(*lengths, kind="add_text"):
    """Return compressed text for a PNG file, in chunks of these lengths."""
    info = PngImagePlugin.PngInfo()
    for length in lengths:
        getattr(info, kind)("Comment", "x" * length, zip=True)
    return info


def moved_to_the_end(png):
    """Return a PNG file with its text after the pixels."""
    start = png.index(b"zTXt") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4])
    last = png.index(b"IEND") - 4
    return png[:start] + png[end:last] + png[start:end] + png[last:]


def modes():
    """Yield (name, file, colour) of one-coloured images in every mode."""
    image = Image.fromarray(RED)
    grey = Image.new("L", (30, 20), 77)
    clear = Image.new("RGBA", (30, 20), (200, 40, 60, 0))
    palette = Image.new("P", (30, 20), 3)
    palette.putpalette([0, 0, 0] * 3 + [200, 40, 60])
    sixteen = Image.fromarray(np.full((20, 30), 77 * 256 + 200, np.uint16))
    red = (200, 40, 60)
    yield "grey JPEG", encoded(grey, quality=100), (77,) * 3
    yield "JPEG", encoded(image, quality=100, subsampling=0), red
    yield "progressive JPEG", encoded(image, quality=100, progressive=True), red
    yield "CMYK JPEG", encoded(Image.new("CMYK", (30, 20), (55, 215, 195, 0)), quality=100), red
    yield "PNG", encoded(image, "PNG"), red
    yield "grey PNG", encoded(grey, "PNG"), (77,) * 3
    yield "grey and transparent PNG", encoded(Image.new("LA", (30, 20), (77, 9)), "PNG"), (77,) * 3
    yield "transparent PNG", encoded(clear, "PNG"), red
    yield "palette PNG", encoded(palette, "PNG"), red
    yield "palette PNG with transparency", encoded(palette, "PNG", transparency=bytes([0, 0, 0, 9])), red
    yield "16-bit PNG", encoded(sixteen, "PNG"), (77,) * 3
    yield "16-bit TIFF", encoded(sixteen, "TIFF"), (77,) * 3
    yield "16-bit PGM", b"P5 30 20 65535\n" + (77 * 256 + 200).to_bytes(2) * 600, (77,) * 3
    yield "10-bit PGM", b"P5 30 20 1023\n" + (77 * 4 + 2).to_bytes(2) * 600, (77,) * 3
    yield "PNG with a megabyte of text", encoded(image, "PNG", pnginfo=text(2**20 + 1)), red
    yield "PNG with 65 megabytes of text", encoded(image, "PNG", pnginfo=text(*[2**20] * 65)), red
    yield "PNG with text after its pixels", moved_to_the_end(encoded(image, "PNG", pnginfo=text(2**21))), red
    yield "PNG with international text", encoded(image, "PNG", pnginfo=text(2**21, kind="add_itxt")), red
    yield "PNG with a colour profile of two megabytes", encoded(image, "PNG", icc_profile=bytes(2**21)), red
    yield "one-bit PNG", encoded(Image.new("1", (30, 20), 1), "PNG"), (255,) * 3
    yield "GIF", encoded(palette, "GIF"), red
    yield "BMP", encoded(image, "BMP"), red
    yield "WebP", encoded(image, "WEBP", lossless=True), red


def turned(orientation):
    """Return a JPEG that is dark above and bright below, with an EXIF orientation."""
    pixels = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[:, None, None], 40, axis=1).repeat(3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, exif=exif, quality=95)


def broken():
    """Yield (name, file, reason) of files that cannot be read."""
    jpeg, png = encoded(photo(60, 80)), encoded(photo(60, 80), "PNG")
    yield "empty", b"", "not an image"
    yield "HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an image of type heic, which this Pillow cannot read"
    yield "text", b"<html>404</html>", "not an image"
    yield "half a JPEG", jpeg[: len(jpeg) // 2], "truncated"
    yield "most of a JPEG", jpeg[:-200], "truncated"
    yield "a JPEG's first bytes", jpeg[:10], "."
    yield "half a PNG", png[: len(png) // 2], "truncated"
    yield "a PNG's first bytes", png[:20], "."
    yield "floating point", encoded(Image.new("F", (30, 20), 0.5), "TIFF"), "32 bits"


def subsampled(factors):
    """Return a grey JPEG with these sampling factors; written by hand, because PIL writes only three of the kinds."""
    table = bytes(64 * [1])
    frame = bytes([8, 0, 32, 0, 32, 3]) + b"".join(bytes([i + 1, factor, 0]) for i, factor in enumerate(factors))
    codes = bytes([1, *[0] * 15, 0])  # a single code, "0": no difference (DC), no more values (AC)
    scan = bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])
    segments = [(0xDB, b"\0" + table), (0xC0, frame), (0xC4, b"\x00" + codes + b"\x10" + codes), (0xDA, scan)]
    header = b"".join(bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body for marker, body in segments)
    return b"\xff\xd8" + header + bytes(64) + b"\xff\xd9"
