"""Nearest-neighbour resizing by the rules of PyTorch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from scconv_jax.shapes import Array, Float


def resize_nearest(x: Float[Array, "n h w c"], size: tuple[int, int]) -> Float[Array, "n p q c"]:
    """Resize as `torch.nn.functional.interpolate(mode="nearest")` does: output `i` copies input `floor(i * in / out)`.

    PyTorch takes that product in float32, which for a few sizes (24 → 74, say) falls below the whole number it should
    reach; the same pixels are copied here. `jax.image.resize` samples at pixel centres and copies others (3 → 14, say).

    Args:
        x: maps, `(n, h, w, c)`.
        size: height and width of the result.
    """
    for axis, out in zip((1, 2), size, strict=True):
        x = _repeat_nearest(x, axis, out)
    return x


def _repeat_nearest(x: Float[Array, "n h w c"], axis: int, out: int) -> Float[Array, "n p q c"]:
    size = x.shape[axis]
    if out == size:
        return x
    scale = np.float32(size) / np.float32(out)
    source = np.minimum(np.floor(np.arange(out, dtype=np.float32) * scale).astype(int), size - 1)
    copies = out // size
    if copies and np.array_equal(
        source, np.arange(out) // copies
    ):  # every pixel as often: no gather, and no scatter in the gradient
        return jnp.repeat(x, copies, axis=axis, total_repeat_length=out)
    return jnp.take(x, source, axis=axis, indices_are_sorted=True, unique_indices=False, mode="clip")
