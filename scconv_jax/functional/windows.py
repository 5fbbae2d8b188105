"""Sliding windows as shifted copies of a map, shared by depthwise convolution and max-pooling."""

from __future__ import annotations

import numpy as np
from jax import lax

from scconv_jax.shapes import Array, Float


def taps(
    x: Float[Array, "n h w c"], fill: float, window: tuple[int, int], strides: int, padding: int, dilation: int = 1
) -> list[Float[Array, "n p q c"]]:
    """Return one shifted, strided copy of `x` for each position in a sliding window, row by row.

    Args:
        x: Maps, `(n, h, w, c)`.
        fill: Value of the padding.
        window: Height and width of the window, dilation included, in pixels.
        strides: Step of the window.
        padding: Pixels added on each side.
        dilation: Distance between two positions in the window.
    """
    margins = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
    padded = lax.pad(x, np.array(fill, x.dtype), margins)
    last = [(padded.shape[axis] - reach) // strides * strides for axis, reach in zip((1, 2), window, strict=True)]
    n, c = x.shape[0], x.shape[3]
    return [  # `padded[:, i::strides]` would not accept symbolic sizes
        lax.slice(padded, (0, i, j, 0), (n, i + last[0] + 1, j + last[1] + 1, c), (1, strides, strides, 1))
        for i in range(0, window[0], dilation)
        for j in range(0, window[1], dilation)
    ]
