"""RandAugment against PIL's operations, which torchvision calls."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from train.data.randaugment import OPERATIONS, apply, rand_augment

SIZES = [(31, 40), (24, 24)]


def picture(size, seed=0):
    """Return smooth colours with an edge and noise: values of all sizes, no constant channel."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([40 + 3 * x, 60 + 4 * y, 220 - 2 * x - y], axis=-1) + 60 * (x > y)[..., None]
    return np.clip(smooth + rng.normal(0, 9, (height, width, 3)), 5, 240).astype(np.uint8)


def with_pil(name, image, magnitude, sign):
    """Return the image after PIL's operation; the strength is `magnitude` / 30."""
    pil, share = Image.fromarray(image), magnitude / 30
    width, height = pil.size

    def affine(*matrix):
        return pil.transform(pil.size, Image.Transform.AFFINE, matrix)

    shear, factor = sign * 0.3 * share, 1 + sign * 0.9 * share
    across, down = (sign * int(150 / 331 * size * share) for size in (width, height))
    results = {
        "identity": lambda: pil,
        "shear_x": lambda: affine(1, shear, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, shear, 1, 0),
        "translate_x": lambda: affine(1, 0, across, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, down),
        "rotate": lambda: pil.rotate(sign * 30 * share),
        "brightness": lambda: ImageEnhance.Brightness(pil).enhance(factor),
        "color": lambda: ImageEnhance.Color(pil).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(pil).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(pil).enhance(factor),
        "posterize": lambda: ImageOps.posterize(pil, 8 - round(magnitude / 7.5)),
        "solarize": lambda: ImageOps.solarize(pil, math.ceil(255 * (1 - share))),
        "autocontrast": lambda: ImageOps.autocontrast(pil),
        "equalize": lambda: ImageOps.equalize(pil),
    }
    return np.asarray(results[name]())


@functools.cache
def ours(magnitude):
    return jax.jit(lambda operation, image, sign: apply(operation, image, magnitude, sign))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_pil(name, magnitude, size):
    image = picture(size)
    for sign in (1, -1):
        found = np.asarray(ours(magnitude)(OPERATIONS.index(name), image, jnp.float32(sign)))
        expected = with_pil(name, image, magnitude, sign)
        assert found.dtype == np.uint8
        if name in ("shear_x", "shear_y", "rotate"):
            # A pixel's centre may fall on the border of two; PIL counts in 1/65536 of a pixel.
            assert (found != expected).any(-1).mean() < 0.01
        elif name in ("brightness", "color", "contrast", "sharpness"):
            assert np.abs(found.astype(int) - expected).max() <= 1, "rounded down from float32"
            assert (found != expected).mean() < 0.02
        elif name == "autocontrast":  # PIL's float64 makes 254 of some quotients that are 255 exactly
            np.testing.assert_array_equal(found, np.where(found == 255, 255, expected))
            assert np.abs(found.astype(int) - expected).max() <= 1
        else:
            np.testing.assert_array_equal(found, expected)
        assert (name in ("identity",)) == np.array_equal(expected, image), "the operation does something"


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_a_picture_of_one_colour_stays(name):
    image = np.full((12, 12, 3), 77, np.uint8)
    np.testing.assert_array_equal(ours(9)(OPERATIONS.index(name), image, 1.0), image)


@pytest.mark.parametrize(("size", "magnitude"), [(SIZES[0], 30), (SIZES[1], 9)])
def test_the_forms_for_tpus_give_the_same_pixels(size, magnitude, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu=None, default, **_: (tpu or default)(*arrays))
    on_tpu = jax.jit(lambda operation, image, sign: apply(operation, image, magnitude, sign))
    for operation in range(len(OPERATIONS)):
        for sign in (jnp.float32(1), jnp.float32(-1)):
            image = picture(size, seed=operation)
            np.testing.assert_array_equal(on_tpu(operation, image, sign), ours(magnitude)(operation, image, sign))


def test_all_operations_are_drawn_alike_in_both_directions():
    """The results tell operations apart: the identity, 9 operations with two signs, and 4 without."""
    image = picture((24, 24))
    keys = jax.random.split(jax.random.key(0), 600)
    results = np.asarray(jax.jit(jax.vmap(lambda key: rand_augment(key, jnp.asarray(image), 1, 20)))(keys))
    kinds, counts = np.unique(results.reshape(600, -1), axis=0, return_counts=True)
    assert len(kinds) == 1 + 2 * 9 + 4
    assert counts.max() < 80


def test_no_operations_leave_the_image():
    image = jnp.asarray(picture((16, 16)))
    np.testing.assert_array_equal(rand_augment(jax.random.key(0), image, 0, 9), image)


def test_two_operations_follow_each_other():
    image, key = jnp.asarray(picture((24, 24))), jax.random.key(3)
    both = jax.jit(lambda key, image: rand_augment(key, image, 2, 9))(key, image)
    for part in jax.random.split(key, 2):
        draw, sign = jax.random.split(part)
        operation = jax.random.randint(draw, (), 0, len(OPERATIONS))
        image = ours(9)(operation, image, jnp.where(jax.random.bernoulli(sign), 1.0, -1.0))
    np.testing.assert_array_equal(both, image)
