"""Pooling with PyTorch's rules.

References: `torch.nn.functional.avg_pool2d`, `max_pool2d`, `adaptive_avg_pool2d(x, 1)`,
https://docs.pytorch.org/docs/stable/nn.functional.html#pooling-functions

At the border, PyTorch divides an average either by the size of the window within the padded map or by the number of its pixels
within the map. The reference networks use both.

Differences: windows, strides and padding are the same for height and width. Averages of float16 and bfloat16 are summed in
float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scconv_jax.functional.checks import check_maps, check_positive_int
from scconv_jax.functional.platforms import by_platform
from scconv_jax.functional.symbolic import check_multiple, is_below, is_multiple, is_symbolic
from scconv_jax.functional.windows import taps
from scconv_jax.shapes import Array, Float


def avg_pool(
    x: Float[Array, "n h w c"],
    window: int,
    strides: int | None = None,
    *,
    padding: int = 0,
    count_include_pad: bool = True,
    ceil_mode: bool = False,
) -> Float[Array, "n p q c"]:
    """Average over windows as `torch.nn.functional.avg_pool2d` does.

    Args:
        x: Maps, `(n, h, w, c)`.
        window: Height and width of the window, in pixels.
        strides: Step of the window. If None, `window`.
        padding: Zeros added on each side.
        count_include_pad: If True, divide by the size of the window within the padded map; if False, by the number of its
            pixels within the map.
        ceil_mode: Keep a last window that extends beyond the padded map, if it starts within the map or its left padding.

    Returns:
        `(n, p, q, c)` with `p = (h + 2 padding - window) // strides + 1` (rounded up in ceiling mode), in the dtype of `x`. Sums
        are computed in float32, or in float64 for float64 maps.

    Raises:
        ValueError: If `x` does not have four axes, a size is not a positive integer, or the map is too small for one window.
    """
    check_maps("avg_pool", x)
    check_positive_int(window=window, strides=strides)
    strides = window if strides is None else strides
    height, width = x.shape[1:3]
    smallest = max(window - 2 * padding - (strides - 1 if ceil_mode else 0), 1)
    if is_below(height, smallest) or is_below(width, smallest):
        raise ValueError(
            f"avg_pool: a window of {window}×{window} needs a map of at least {smallest} px in height "
            f"and width; got {height}×{width}. Use larger images or a smaller window."
        )
    if ceil_mode:
        check_multiple(height, strides, 2 * padding - window)
        check_multiple(width, strides, 2 * padding - window)
    fits = not ceil_mode or (is_multiple(height, window) and is_multiple(width, window))
    if strides == window and padding == 0 and fits:
        # The windows tile the map. A reshape and a mean are several times as fast as a window reduction.
        p, q = height // window, width // window
        n, channels = x.shape[0], x.shape[-1]
        tiled = lax.slice(x, (0, 0, 0, 0), (n, p * window, q * window, channels))
        return tiled.reshape(n, p, window, q, window, channels).mean(axis=(2, 4))
    accumulated = jnp.promote_types(x.dtype, jnp.float32)

    def summed(x: Array, *high: int) -> Array:
        margins = ((0, 0), *((padding, pixels) for pixels in high), (0, 0))
        return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, window, window, 1), (1, strides, strides, 1), margins)

    if is_symbolic(height, width):  # no window extends beyond the padded map
        ones = jnp.ones((1, height, width, 1), accumulated)
        counts = window**2 if count_include_pad else summed(ones, padding, padding)
        return (summed(x.astype(accumulated), padding, padding) / counts).astype(x.dtype)
    rows, columns = (_windows(size, window, strides, padding, ceil_mode) for size in (height, width))
    sums = summed(x.astype(accumulated), rows.high, columns.high)
    if count_include_pad:
        counts = np.multiply.outer(rows.padded, columns.padded)
    else:
        counts = np.multiply.outer(rows.inside, columns.inside)
    return (sums / counts[None, :, :, None].astype(accumulated)).astype(x.dtype)


class _Windows(NamedTuple):
    """The windows along one axis: the padding needed at its end, and the size of each window."""

    high: int
    padded: np.ndarray  # pixels within the padded map
    inside: np.ndarray  # pixels within the map


def _windows(size: int, window: int, strides: int, padding: int, ceil_mode: bool) -> _Windows:
    span = size + 2 * padding - window
    count = (-(-span // strides) if ceil_mode else span // strides) + 1
    if ceil_mode and (count - 1) * strides >= size + padding:
        count -= 1  # the last window would start in the padding on the right
    starts = np.arange(count) * strides - padding
    ends = np.minimum(starts + window, size + padding)
    high = max(int(starts[-1]) + window - size, 0)
    return _Windows(high, ends - starts, np.minimum(ends, size) - np.maximum(starts, 0))


def max_pool(x: Float[Array, "n h w c"], window: int, strides: int, *, padding: int = 0) -> Float[Array, "n p q c"]:
    """Take the maximum of each window as `torch.nn.functional.max_pool2d` does.

    Args:
        x: Maps, `(n, h, w, c)`.
        window: Height and width of the window, in pixels.
        strides: Step of the window.
        padding: Pixels of -inf added on each side.

    Returns:
        `(n, p, q, c)` with `p = (h + 2 padding - window) // strides + 1`, in the dtype of `x`. As in PyTorch, NaN is the maximum
        of its window, and the first of equal maxima receives the gradient.
    """
    options = {"window": window, "strides": strides, "padding": padding}
    return by_platform(compared_max_pool, native_max_pool, x, gpu=indexed_max_pool, **options)


def compared_max_pool(x: Float[Array, "n h w c"], *, window: int, strides: int, padding: int) -> Float[Array, "n p q c"]:
    """Compare the shifted maps. On CPU, the gradient of `native_max_pool` is a scatter that takes twenty times as long."""
    first, *others = taps(x, -np.inf, (window, window), strides, padding)
    largest = first
    for tap in others:
        largest = jnp.where((tap > largest) | jnp.isnan(tap), tap, largest)
    return largest


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _indexed_max_pool(x: Float[Array, "n h w c"], window: int, strides: int, padding: int) -> Float[Array, "n p q c"]:
    return compared_max_pool(x, window=window, strides=strides, padding=padding)


@_indexed_max_pool.defjvp
def _indexed_max_pool_jvp(window: int, strides: int, padding: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    first, *others = taps(primals[0], -np.inf, (window, window), strides, padding)
    largest, index = first, jnp.zeros(first.shape, jnp.uint8)
    for i, tap in enumerate(others, 1):
        larger = (tap > largest) | jnp.isnan(tap)
        largest, index = jnp.where(larger, tap, largest), jnp.where(larger, jnp.uint8(i), index)
    moved = taps(tangents[0], 0.0, (window, window), strides, padding)
    return largest, sum(jnp.where(index == i, tap, jnp.zeros_like(tap)) for i, tap in enumerate(moved))  # pyright: ignore


def indexed_max_pool(x: Float[Array, "n h w c"], *, window: int, strides: int, padding: int) -> Float[Array, "n p q c"]:
    """Compare the shifted maps and keep the position of the maximum, one byte, for the gradient.

    On GPUs, the gradient of `native_max_pool` computes the positions anew, with two integers each, and then scatters.
    """
    return _indexed_max_pool(x, window, strides, padding)


def native_max_pool(x: Float[Array, "n h w c"], *, window: int, strides: int, padding: int) -> Float[Array, "n p q c"]:
    """Reduce with XLA's own operation. Its gradient stores one map, that of `compared_max_pool` one map per tap."""
    margin = (padding, padding)
    return lax.reduce_window(
        x, np.array(-np.inf, x.dtype), lax.max, (1, window, window, 1), (1, strides, strides, 1), ((0, 0), margin, margin, (0, 0))
    )


def global_avg_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n c"]:
    """Average over all pixels: `(n, h, w, c)` to `(n, c)`, in the dtype of `x`."""
    return x.mean(axis=(1, 2))
