"""Nearest-neighbour resizing with PyTorch's index rule.

Reference: `torch.nn.functional.interpolate(mode="nearest")`,
https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.interpolate.html

    y[i] = x[floor(i · in / out)]     the product in float32

In float32 the product falls just below a whole number for some sizes, such as 24 → 74. `jax.image.resize` samples at pixel
centres instead, so for sizes such as 3 → 14 it copies other pixels.

Differences: none.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
from jax import lax

from scconv_jax.functional.symbolic import Size, is_symbolic, value
from scconv_jax.shapes import Array, Float


def resize_nearest(x: Float[Array, "n h w c"], size: tuple[Size, Size]) -> Float[Array, "n p q c"]:
    """Resize as `torch.nn.functional.interpolate(mode="nearest")` does.

    Args:
        x: Maps, `(n, h, w, c)`.
        size: Height and width of the result, in pixels.

    Returns:
        `(n, *size, c)`, in the dtype of `x`.
    """
    for axis, out in zip((1, 2), size, strict=True):
        x = _repeat_nearest(x, axis, out)
    return x


def _repeat_nearest(x: Float[Array, "n h w c"], axis: int, out: Size) -> Float[Array, "n p q c"]:
    size = x.shape[axis]
    if out == size:
        return x
    if is_symbolic(size, out):
        scale = value(size, jnp.float32) / value(out, jnp.float32)
        source = jnp.floor(jnp.arange(out, dtype=jnp.float32) * scale).astype(jnp.int32)
        return jnp.take(x, source, axis=axis, indices_are_sorted=True, unique_indices=False, mode="clip")
    source = source_pixels(size, out)
    if out < size:
        return jnp.take(x, source, axis=axis, indices_are_sorted=True, unique_indices=False, mode="clip")
    # Runs of pixels that are repeated equally often: no gather, and no scatter in the gradient, which are slow on accelerators.
    copies = np.bincount(source, minlength=size)
    bounds = [*np.flatnonzero(np.diff(copies, prepend=-1)).tolist(), size]
    runs = [jnp.repeat(lax.slice_in_dim(x, a, b, axis=axis), int(copies[a]), axis=axis) for a, b in itertools.pairwise(bounds)]
    return jnp.concatenate(runs, axis=axis)


def source_pixels(size: int, out: int) -> np.ndarray:
    """Return the position in a line of `size` pixels that each of `out` pixels is copied from."""
    scale = np.float32(size) / np.float32(out)
    return np.minimum(np.floor(np.arange(out, dtype=np.float32) * scale).astype(int), size - 1)
