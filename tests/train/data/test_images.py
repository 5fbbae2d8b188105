import io
import warnings

import numpy as np
import pytest
from PIL import Image

from train.data.batches import UnreadableImageError
from train.data.images import center_crop, crop_box, decode, random_resized_crop


def photo(height, width, seed=0):
    """Smooth in the large, rough in the small: uint8 (h, w, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(small) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(pixels, kind="JPEG", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def whole(data, size, **options):
    """The whole image, resized as in training."""
    return random_resized_crop(data, size, np.random.default_rng(0), scale=(1, 1), ratio=(1e-9, 1e9), **options)


def by_torchvisions_rules(image, size, resize):
    """`Resize(resize)` and `CenterCrop(size)` as their documentation and code say, on an RGB image."""
    w, h = image.size
    if w <= h:
        short, long = w, int(resize * h / w)
        image = image if short == resize else image.resize((resize, long), Image.Resampling.BILINEAR)
    else:
        short, long = h, int(resize * w / h)
        image = image if short == resize else image.resize((long, resize), Image.Resampling.BILINEAR)
    w, h = image.size
    top, left = round((h - size) / 2.0), round((w - size) / 2.0)
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (257, 256), (97, 61), (30, 301), (1203, 907)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37), (33, 37)])
def test_evaluation_is_torchvisions(height, width, size, resize):
    data = encoded(photo(height, width), quality=90)
    found = center_crop(data, size, resize)
    np.testing.assert_array_equal(found, by_torchvisions_rules(Image.open(io.BytesIO(data)).convert("RGB"), size, resize))
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)


RED = np.full((20, 30, 3), (200, 40, 60), np.uint8)


def modes():
    """Files of one colour in every mode → that colour."""
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
    yield "one-bit PNG", encoded(Image.new("1", (30, 20), 1), "PNG"), (255,) * 3
    yield "GIF", encoded(palette, "GIF"), red
    yield "BMP", encoded(image, "BMP"), red
    yield "WebP", encoded(image, "WEBP", lossless=True), red


@pytest.mark.parametrize(("data", "color"), [pytest.param(data, color, id=name) for name, data, color in modes()])
def test_every_kind_of_image_has_its_colours(data, color):
    for pixels in (center_crop(data, 16, 16), whole(data, 16), center_crop(data, 16, 16, exif=True)):
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels.astype(int) - color).max() <= 3


def turned(orientation):
    """A JPEG, dark above and bright below, whose orientation says something."""
    pixels = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[:, None, None], 40, axis=1).repeat(3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, exif=exif, quality=95)


@pytest.mark.parametrize(
    "crop", [lambda data, **exif: center_crop(data, 32, 32, **exif), lambda data, **exif: whole(data, 32, **exif)]
)
def test_the_orientation_is_ignored_as_torchvision_does_and_followed_on_request(crop):
    for data in (turned(1), turned(3), turned(6)):
        plain = crop(data)
        assert plain[0].mean() < 20 < 235 < plain[-1].mean()
    assert crop(turned(1), exif=True)[0].mean() < 20
    upside_down = crop(turned(3), exif=True)
    assert upside_down[0].mean() > 235 > 20 > upside_down[-1].mean()
    on_its_side = crop(turned(6), exif=True)
    assert on_its_side[:, 0].mean() > 235 > 20 > on_its_side[:, -1].mean()


def broken():
    jpeg, png = encoded(photo(60, 80)), encoded(photo(60, 80), "PNG")
    yield "empty", b"", "not an image"
    yield "text", b"<html>404</html>", "not an image"
    yield "half a JPEG", jpeg[: len(jpeg) // 2], "truncated"
    yield "most of a JPEG", jpeg[:-200], "truncated"
    yield "a JPEG's first bytes", jpeg[:10], "."
    yield "half a PNG", png[: len(png) // 2], "truncated"
    yield "a PNG's first bytes", png[:20], "."
    yield "floating point", encoded(Image.new("F", (30, 20), 0.5), "TIFF"), "32 bits"


@pytest.mark.parametrize(("data", "reason"), [pytest.param(data, reason, id=name) for name, data, reason in broken()])
def test_what_cannot_be_read_says_why(data, reason):
    for crop in (lambda: center_crop(data, 16, 16), lambda: whole(data, 16), lambda: whole(data, 16, exif=True)):
        with pytest.raises(UnreadableImageError, match=reason):
            crop()


def subsampled(factors):
    """A JPEG of one colour, its components sampled so: written by hand, since PIL writes no more than three of the kinds."""
    table = bytes(64 * [1])
    frame = bytes([8, 0, 32, 0, 32, 3]) + b"".join(bytes([i + 1, factor, 0]) for i, factor in enumerate(factors))
    codes = bytes([1, *[0] * 15, 0])  # a single code, "0": no difference (DC), no more values (AC)
    scan = bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])
    segments = [(0xDB, b"\0" + table), (0xC0, frame), (0xC4, b"\x00" + codes + b"\x10" + codes), (0xDA, scan)]
    header = b"".join(bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body for marker, body in segments)
    return b"\xff\xd8" + header + bytes(64) + b"\xff\xd9"


@pytest.mark.parametrize(
    "factors",
    [(luma, 0x11, 0x11) for luma in (0x11, 0x21, 0x22, 0x12, 0x41, 0x14, 0x24, 0x31)] + [(0x11, 0x22, 0x22), (0x22, 0x12, 0x21)],
    ids=lambda factors: "".join(f"{factor:x}" for factor in factors),
)
def test_every_kind_of_subsampling_is_read(factors):
    data = subsampled(factors)
    for pixels in (center_crop(data, 16, 16), whole(data, 16)):
        assert (pixels == 128).all()


def test_a_line_is_not_resized_to_what_would_not_fit_in_memory():
    data = encoded(Image.new("L", (60_000, 1), 77), "PNG")
    assert (whole(data, 32) == 77).all()
    assert (center_crop(data, 32, 32) == 77).all()
    with pytest.raises(UnreadableImageError, match=r"^60000 × 1 pixels, which would be 15360000 × 256 when resized$"):
        center_crop(data, 224, 256)


def test_a_truncated_file_is_found_whichever_part_is_asked_for():
    """Not all of which are decoded that far."""
    data = encoded(photo(300, 200))[:-200]
    for key in range(10):
        with pytest.raises(UnreadableImageError, match="truncated"):
            random_resized_crop(data, 32, np.random.default_rng(key), scale=(0.05, 0.1))


def test_a_crop_is_decided_by_its_key_alone():
    data = encoded(photo(200, 300))
    first, again, other = (random_resized_crop(data, 32, np.random.default_rng(key)) for key in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("height", "width"), [(80, 90), (100, 120), (330, 500), (1030, 900)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_pixels_are_near_those_of_an_antialiased_resize(height, width, kind):
    """At every factor of scaled decoding, also where the image is enlarged: of the same part."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:height, :width] * 2 * np.pi / min(height, width)
    smooth = 128 + 60 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    data = encoded(smooth.astype(np.uint8), kind, **({"quality": 97} if kind == "JPEG" else {}))
    for _ in range(5):
        state = rng.bit_generator.state
        found = random_resized_crop(data, 64, rng)
        rng.bit_generator.state = state
        top, left, h, w = crop_box(height, width, rng, (0.08, 1), (3 / 4, 4 / 3))
        box = (left, top, left + w, top + h)
        expected = np.asarray(decode(data).resize((64, 64), Image.Resampling.BILINEAR, box=box))
        assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize(("height", "width"), [(211, 300), (1031, 900)])
def test_leaving_out_the_rows_below_a_crop_changes_no_pixel(height, width, options):
    """A byte after the end makes a file whose rows are all decoded."""
    rng = np.random.default_rng(2)
    for quality in (50, 95):
        data = encoded(photo(height, width), quality=quality, **options)
        for _ in range(8):
            key = int(rng.integers(2**32))
            found, expected = (random_resized_crop(d, 64, np.random.default_rng(key)) for d in (data, data + b"\0"))
            np.testing.assert_array_equal(found, expected)


def test_boxes_have_the_distribution_of_torchvision():
    """Area uniform, ratio log-uniform, place uniform: moments of 4,000 boxes of a square that all fit."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(1000, 1000, rng, (0.1, 0.5), (0.8, 1.25)) for _ in range(4000)], float)
    top, left, height, width = boxes.T
    area, ratio = height * width / 1e6, np.log(width / height)
    assert abs(area.mean() - 0.3) < 0.006
    assert abs(area.std() - 0.4 / 12**0.5) < 0.004
    assert abs(ratio.mean()) < 0.006
    assert abs(ratio.std() - 2 * np.log(1.25) / 12**0.5) < 0.004
    assert abs((top / (1000 - height)).mean() - 0.5) < 0.015
    assert abs((left / (1000 - width)).mean() - 0.5) < 0.015
    assert (boxes >= 0).all()
    assert ((top + height) <= 1000).all()
    assert ((left + width) <= 1000).all()


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (100, 100, (0, 0, 100, 100))],
)
def test_where_no_box_fits_the_largest_central_one_is_taken(height, width, box):
    assert crop_box(height, width, np.random.default_rng(0), (2, 3), (3 / 4, 4 / 3)) == box


def test_no_warning_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, data, _ in modes():
            center_crop(data, 16, 16)
