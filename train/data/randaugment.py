"""RandAugment on the device: a few operations drawn at random, all with the same strength.

Cubuk, Zoph, Shlens, Le, "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space", NeurIPS 2020. The
operations, their ranges and their 31 strengths are torchvision's `RandAugment`. The pixels are PIL's, which torchvision calls,
with nearest-pixel sampling and black outside the image.

All operations are computed for each image and one is kept, because a device does the same for a whole batch.

Differences: PIL rounds in float64, or to 1/65536 of a pixel. So a value may differ by 1, or a pixel be a neighbouring one.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

BINS = 31
"""Strengths, 0 (none) to 30."""
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCING = ("brightness", "color", "contrast", "sharpness")
OTHERS = ("posterize", "solarize", "autocontrast", "equalize")
OPERATIONS = ("identity", *GEOMETRIC, *ENHANCING, *OTHERS)


def rand_augment(key: Array, image: Array, operations: int, magnitude: int) -> Array:
    """Apply `operations` random members of `OPERATIONS` to `image`, uint8 (h, w, 3), with strength `magnitude` (0 to 30)."""
    for part in jax.random.split(key, operations):
        operation_key, sign_key = jax.random.split(part)
        sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
        image = apply(jax.random.randint(operation_key, (), 0, len(OPERATIONS)), image, magnitude, sign)
    return image


def apply(operation: Array, image: Array, magnitude: int, sign: Array) -> Array:
    """Apply `OPERATIONS[operation]` to `image`, uint8 (h, w, 3); `sign` (±1) is the direction of operations that have one."""
    strength = magnitude / (BINS - 1)
    height, width = image.shape[:2]
    # The pixel in column x and row y is taken from column a x + b y + c and row d x + e y + f.
    shear, turn = 0.3 * strength * sign, math.radians(30 * strength) * sign
    shift = 150 / 331 * strength
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    middle_x, middle_y = width / 2, height / 2
    same = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    matrices = [
        (1.0, shear, 0.0, 0.0, 1.0, 0.0),
        (1.0, 0.0, 0.0, shear, 1.0, 0.0),
        (1.0, 0.0, sign * int(shift * width), 0.0, 1.0, 0.0),
        (1.0, 0.0, 0.0, 0.0, 1.0, sign * int(shift * height)),
        (cos, -sin, middle_x - cos * middle_x + sin * middle_y, sin, cos, middle_y - sin * middle_x - cos * middle_y),
    ]
    table = jnp.asarray([same, *matrices, *[same] * len(ENHANCING + OTHERS)], jnp.float32)
    moved = transform(image, table[operation])

    factor = 1 + 0.9 * strength * sign
    bits = 8 - round(magnitude / ((BINS - 1) / 4))
    changes: dict[str, Callable[[Array], Array]] = {
        "brightness": lambda x: blend(jnp.zeros_like(x), x, factor),
        "color": lambda x: blend(jnp.broadcast_to(grey(x)[..., None], x.shape), x, factor),
        "contrast": lambda x: blend(jnp.broadcast_to(jnp.floor(grey(x).mean() + 0.5).astype(x.dtype), x.shape), x, factor),
        "sharpness": lambda x: blend(smooth(x), x, factor),
        "posterize": lambda x: x & jnp.uint8(256 - 2 ** (8 - bits)),
        "solarize": lambda x: jnp.where(x >= 255 * (1 - strength), 255 - x, x),
        "autocontrast": autocontrast,
        "equalize": equalize,
    }
    index = jnp.maximum(operation - len(GEOMETRIC), 0)
    return jax.lax.switch(index, [lambda x: x, *(changes[name] for name in ENHANCING + OTHERS)], moved)


def transform(image: Array, matrix: Array) -> Array:
    """Take each pixel from the position to which `matrix` (6,) maps its centre; black outside the image."""
    height, width = image.shape[:2]
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    a, b, c, d, e, f = matrix
    column, row = (jnp.floor(of).astype(jnp.int16) for of in (a * x + b * y + c, d * x + e * y + f))
    return jax.lax.platform_dependent(image, row, column, tpu=take_by_sums, default=take)


def take(image: Array, row: Array, column: Array) -> Array:
    """Return `image[row, column]` (h, w, 3), and black where the position is outside the image."""
    height, width = image.shape[:2]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    taken = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], taken, jnp.zeros_like(taken))


def take_by_sums(image: Array, row: Array, column: Array) -> Array:
    """Return what `take` does without a gather, which reads kilobytes for each pixel on a TPU.

    At most two pixels of an output column may come from the same row of `image`, and they must be neighbours. This holds for
    all operations here: they turn by at most 30°.

    Each pixel is selected by a sum in which all other terms are 0. Pixels that come from row r are first moved along that row,
    then along the output column. The second of two from the same row is moved separately.
    """
    height, width = image.shape[:2]
    red, green, blue = (image[..., channel].astype(jnp.int32) << 8 * channel for channel in range(3))
    packed = red | green | blue
    second = jnp.concatenate([jnp.zeros((1, width), bool), row[1:] == row[:-1]])
    here = row[None] == jnp.arange(height)[:, None, None]  # (source row, output row, column)

    def along_row(mine: Array) -> Array:
        source = jnp.where(here & mine[None], column[None], 0).sum(1)
        return jnp.where(source[..., None] == jnp.arange(width)[None, None], packed[:, None], 0).sum(-1)[:, None]

    result = jnp.where(here, jnp.where(second[None], along_row(second), along_row(~second)), 0).sum(0)
    return (result[..., None] >> jnp.arange(0, 24, 8)[None, None]).astype(jnp.uint8)


def blend(degenerate: Array, image: Array, factor: Array) -> Array:
    """Interpolate from `degenerate` (factor 0) to `image` (1) and beyond; rounded down and clipped to 0 … 255."""
    start = degenerate.astype(jnp.float32)
    return jnp.clip(start + factor * (image.astype(jnp.float32) - start), 0, 255).astype(jnp.uint8)


def grey(image: Array) -> Array:
    """Return luma (h, w) by ITU-R 601, with weights in 1/65536: uint8."""
    red, green, blue = (image[..., channel].astype(jnp.int32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(jnp.uint8)


def smooth(image: Array) -> Array:
    """Return the mean of 3×3 pixels with weight 5 for the middle one; the border is unchanged."""
    pixels = image.astype(jnp.int32)
    height, width = image.shape[:2]
    padded = jnp.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    around = sum(padded[i : height + i, j : width + j] for i in range(3) for j in range(3))
    inner = (2 * (around + 4 * pixels) + 13) // 26
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)
    return jnp.where(border[..., None], image, inner.astype(jnp.uint8))


def autocontrast(image: Array) -> Array:
    """Stretch each channel to 0 … 255; rounded down."""
    pixels = image.astype(jnp.int32)
    low, high = pixels.min((0, 1), keepdims=True), pixels.max((0, 1), keepdims=True)
    return jnp.where(high > low, 255 * (pixels - low) // jnp.maximum(high - low, 1), pixels).astype(jnp.uint8)


def equalize(image: Array) -> Array:
    """Equalise the histogram of each channel with a table of 256 entries."""
    return jax.lax.platform_dependent(image, cpu=partial(_equalize, by_sums=False), default=partial(_equalize, by_sums=True))


def _equalize(image: Array, by_sums: bool) -> Array:
    """Equalise; with `by_sums`, without sorts and gathers, which are slow on accelerators."""
    values = jnp.arange(256, dtype=jnp.uint8)

    def one(channel: Array) -> Array:
        if by_sums:
            below = (channel.ravel()[None] < values[:, None]).sum(1)
        else:
            below = jnp.searchsorted(jnp.sort(channel.ravel()), values)
        # `below` counts the pixels below each value.
        step = below[channel.max()] // 255  # over all pixels except those with the largest value
        table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255).astype(jnp.uint8)
        if by_sums:  # the table never falls
            steps = jnp.diff(table.astype(jnp.int32), prepend=0)
            mapped = jnp.where(channel[..., None] >= values[None, None], steps[None, None], 0).sum(-1).astype(jnp.uint8)
        else:
            mapped = table[channel]
        return jnp.where(step > 0, mapped, channel)

    return jnp.stack([one(image[..., channel]) for channel in range(3)], axis=-1)
