"""Images as networks expect them, against torchvision's rules written from its documentation."""

import io
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from scconv_jax.images import ImageError, Preparation, center_crop, decode, normalize
from tests.image_files import broken, encoded, modes, photo, subsampled, turned

SMALL = Preparation(size=32, resize=37)


def by_torchvisions_rules(image, size, resize):
    """Apply `Resize(resize)` and `CenterCrop(size)` to an RGB image, as torchvision documents them."""
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


def by_torchvision(image, preparation):
    """Apply `Resize`, `CenterCrop`, `ToTensor` and `Normalize`, in float64."""
    pixels = by_torchvisions_rules(image.convert("RGB"), preparation.size, preparation.resize)
    return (pixels / 255 - preparation.mean) / preparation.std


def cropped(data, size, resize, **exif):
    return center_crop(decode(data, **exif), size, resize)


SIZES = [
    (375, 500),
    (500, 333),
    (256, 256),
    (257, 256),
    (97, 61),
    (30, 301),
    (1203, 907),
    (1, 9),
    (9, 1),
    (1, 1),
    (37, 37),
    (37, 50),
]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37), (33, 37)])
def test_pixels_are_torchvisions(height, width, size, resize):
    data = encoded(photo(height, width), quality=90)
    found = cropped(data, size, resize)
    np.testing.assert_array_equal(found, by_torchvisions_rules(Image.open(io.BytesIO(data)).convert("RGB"), size, resize))
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_kind_of_input_gives_the_same_batch(tmp_path, height, width):
    pixels = photo(height, width)
    image, path = Image.fromarray(pixels), tmp_path / "photo.png"
    image.save(path)
    inputs = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, pixels, jnp.asarray(pixels), pixels[None]]
    batches = [scconv_jax.prepare_images(one, SMALL) for one in [*inputs, [path], (image,), iter([pixels]), inputs[:7]]]
    for batch in batches:
        assert (batch.shape[1:], batch.dtype) == ((32, 32, 3), np.float32)
        np.testing.assert_array_equal(batch, np.broadcast_to(batches[0], batch.shape))
    assert [len(batch) for batch in batches] == [1] * 11 + [7]
    np.testing.assert_allclose(batches[0][0], by_torchvision(image, SMALL), rtol=0, atol=1e-6)  # float32 of values up to 2.7


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA", "LA"])
def test_other_modes_are_converted_as_torchvisions_loader_does(mode):
    image = Image.fromarray(photo(60, 80)).convert(mode)
    expected = by_torchvision(image, SMALL)
    np.testing.assert_allclose(scconv_jax.prepare_images(image, SMALL)[0], expected, rtol=0, atol=1e-6)


def test_the_preparation_is_that_of_the_network():
    image = photo(300, 400)
    expected = by_torchvision(Image.fromarray(image), Preparation(224, 256))
    batch = scconv_jax.prepare_images([image, image[:, ::-1]], "scnet50")
    assert batch.shape == (2, 224, 224, 3)
    np.testing.assert_allclose(batch[0], expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"There is no model 'scnet51'\. Did you mean 'scnet50'"):
        scconv_jax.prepare_images(image, "scnet51")


def test_values_are_those_of_compiled_code():
    """Over all values of each channel: with other values beside them, as one array or many, and in a larger program."""
    levels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    preparation = Preparation(16, 16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def function(x):
        return normalize(x, preparation.mean, preparation.std)

    expected = np.asarray(jax.jit(function)(levels))
    prepared = scconv_jax.prepare_images(levels.reshape(16, 16, 3), preparation)
    np.testing.assert_array_equal(prepared.reshape(256, 3), expected)
    for shape in ((1, 16, 16, 3), (2, 8, 16, 3), (256, 1, 1, 3), (16, 4, 4, 3)):
        np.testing.assert_array_equal(np.asarray(jax.jit(function)(levels.reshape(shape))).reshape(256, 3), expected)
    larger, _ = jax.jit(lambda x: (function(x), jnp.tanh(function(x[::-1])).sum()))(levels)
    np.testing.assert_array_equal(larger, expected)


def test_normalize():
    result = normalize(jnp.asarray([[[[0, 51, 255]]]], jnp.uint8), mean=(0.0, 0.1, 0.5), std=(1.0, 0.5, 0.25))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [[[[0, 0.2, 2]]]], atol=1e-7)


@pytest.mark.parametrize(("data", "color"), [pytest.param(data, color, id=name) for name, data, color in modes()])
def test_every_kind_of_image_has_its_colours(data, color):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pixels in (cropped(data, 16, 16), cropped(data, 16, 16, exif=True)):
            assert pixels.shape == (16, 16, 3)
            assert np.abs(pixels.astype(int) - color).max() <= 3


def test_the_orientation_is_ignored_as_torchvision_does_and_followed_on_request():
    for data in (turned(1), turned(3), turned(6)):
        (plain,) = scconv_jax.prepare_images(data, SMALL)
        assert plain[0].mean() < -1.5 < 1.5 < plain[-1].mean()
    upright = scconv_jax.prepare_images([turned(1), turned(3), turned(6)], SMALL, exif=True)
    assert upright[0, 0].mean() < -1.5
    assert upright[1, 0].mean() > 1.5 > -1.5 > upright[1, -1].mean()
    assert upright[2, :, 0].mean() > 1.5 > -1.5 > upright[2, :, -1].mean()
    pil = Image.open(io.BytesIO(turned(6)))
    np.testing.assert_array_equal(scconv_jax.prepare_images(pil, SMALL, exif=True)[0], upright[2])


def test_the_images_of_the_caller_stay_as_they_are():
    image = Image.open(io.BytesIO(encoded(Image.new("P", (30, 20), 3), "PNG", transparency=bytes([0, 0, 0, 9]))))
    pixels = photo(30, 40)
    before = pixels.copy()
    scconv_jax.prepare_images([image, pixels], SMALL)
    assert (image.mode, image.size, "transparency" in image.info) == ("P", (30, 20), True)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    "factors",
    [(luma, 0x11, 0x11) for luma in (0x11, 0x21, 0x22, 0x12, 0x41, 0x14, 0x24, 0x31)] + [(0x11, 0x22, 0x22), (0x22, 0x12, 0x21)],
    ids=lambda factors: "".join(f"{factor:x}" for factor in factors),
)
def test_every_kind_of_subsampling_is_read(factors):
    assert (cropped(subsampled(factors), 16, 16) == 128).all()


@pytest.mark.parametrize(("data", "reason"), [pytest.param(data, reason, id=name) for name, data, reason in broken()])
def test_what_cannot_be_read_says_why_and_which(tmp_path, data, reason):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    good = photo(20, 20)
    for exif in (False, True):
        with pytest.raises(ImageError, match=rf"^images\[1\] cannot be read: .*{reason}"):
            scconv_jax.prepare_images([good, data], SMALL, exif=exif)
        with pytest.raises(ImageError, match=rf"photo\.jpg cannot be read: .*{reason}"):
            scconv_jax.prepare_images(path, SMALL, exif=exif)


def test_a_truncated_pil_image_is_named():
    data = encoded(photo(60, 80))
    image = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ImageError, match=r"^images\[0\] cannot be read: .*truncated"):
        scconv_jax.prepare_images(image, SMALL)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        scconv_jax.prepare_images(tmp_path / "nowhere.jpg", SMALL)
    with pytest.raises(IsADirectoryError, match=Path(tmp_path).name):
        scconv_jax.prepare_images(str(tmp_path), SMALL)


@pytest.mark.parametrize(("width", "height"), [(1, 301), (300, 1), (2, 77), (90, 3), (41, 40), (400, 64)])
def test_only_the_middle_of_a_long_image_is_resized_where_the_whole_would_not_fit(monkeypatch, width, height):
    """The pixels are the same, if the longer side is not rounded: here it is enlarged 16 times, or halved."""
    image = Image.fromarray(photo(height, width))
    resize = 32 if height == 64 else 16 * min(width, height)
    size = resize - 5
    whole = center_crop(image, size, resize)
    monkeypatch.setattr(scconv_jax.images, "MAX_PIXELS", resize**2)
    resized = []
    resize_image = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *args: resized.append(image.size) or resize_image(image, *args))
    np.testing.assert_array_equal(center_crop(image, size, resize), whole)
    assert max(resized[0]) <= 4 * min(width, height) + 9


def test_a_line_can_be_tested_on():
    data = encoded(Image.new("L", (60_000, 1), 77), "PNG")
    assert (cropped(data, 32, 32) == 77).all()
    assert (cropped(data, 224, 256) == 77).all()


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        ([], ValueError, "images is empty: there is nothing to prepare"),
        (np.zeros((0, 9, 9, 3), np.uint8), ValueError, "images is empty"),
        (None, TypeError, r"images\[0\] is of type NoneType; expected a path, bytes, a PIL image or a uint8 array \(h, w, 3\)"),
        (["photo.png", 3], FileNotFoundError, "photo.png"),
        ([np.zeros((9, 9, 3), np.uint8), 3], TypeError, r"images\[1\] is of type int; expected a path, bytes"),
        (
            np.zeros((9, 9, 3), np.float32),
            TypeError,
            r"images\[0\] is an array of float32 with shape \(9, 9, 3\); expected uint8 \(h, w, 3\) with values 0 to 255\. "
            r"For values in 0\.\.1, pass np\.uint8\(np\.round\(255 \* array\)\)",
        ),
        (np.zeros((2, 9, 9, 3)), TypeError, r"images\[0\] is an array of float64 with shape \(9, 9, 3\)"),
        (jnp.zeros((9, 9, 3)), TypeError, r"images\[0\] is an array of float32"),
        (np.zeros((9, 9, 3), np.int64), TypeError, r"array of int64 with shape \(9, 9, 3\); expected uint8"),
        (np.zeros((9, 8), np.uint8), ValueError, r"shape \(9, 8\); expected uint8 .*\. Repeat a grey image to three channels"),
        (np.zeros((9, 8, 1), np.uint8), ValueError, r"shape \(9, 8, 1\); .*\. Repeat a grey image to three channels"),
        (np.zeros((9, 8, 4), np.uint8), ValueError, r"shape \(9, 8, 4\); .*\. For RGBA, pass array\[\.\.\., :3\]"),
        (np.zeros((3, 9, 8), np.uint8), ValueError, r"shape \(3, 9, 8\); .* channels first: pass array\.transpose\(1, 2, 0\)"),
        (np.zeros((2, 3, 9, 8), np.uint8), ValueError, r"images\[0\] .* channels first: pass array\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 2, 9, 9, 3), np.uint8), ValueError, r"shape \(1, 2, 9, 9, 3\); expected uint8 \(h, w, 3\)"),
        (np.zeros((0, 9, 3), np.uint8), ValueError, r"shape \(0, 9, 3\); expected uint8 \(h, w, 3\)"),
    ],
)
def test_what_is_no_image_says_what_is_expected(images, kind, message):
    with pytest.raises(kind, match=message):
        scconv_jax.prepare_images(images, SMALL)


@pytest.mark.parametrize(("size", "resize"), [(224, 200), (0, 3), (-1, -1)])
def test_a_crop_larger_than_the_image_is_an_error(size, resize):
    with pytest.raises(ValueError, match=rf"resize={resize} must be at least size={size}, and both must be positive"):
        Preparation(size, resize)


def test_a_missing_pillow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"^Preparing images needs Pillow: pip install 'scconv-jax\[images\]'$"):
        scconv_jax.prepare_images(np.zeros((9, 9, 3), np.uint8), SMALL)
