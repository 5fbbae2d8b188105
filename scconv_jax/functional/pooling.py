"""Pooling by the rules of PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from scconv_jax.functional.checks import check_maps, check_whole
from scconv_jax.functional.convolution import taps
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
        x: maps, `(n, h, w, c)`.
        window: height and width of the window, pixels.
        strides: step of the window; `window` where not given.
        padding: zeros on each side.
        count_include_pad: divide by the window's size within the padded map, not by its pixels within the map.
        ceil_mode: keep a last window that sticks out, where it starts within the map (or its left padding).

    Returns:
        `(n, p, q, c)`, in the dtype of `x`; sums are taken in float32 at least.

    Raises:
        ValueError: if `x` has no four axes, or if the padded map is so small that there is no output: smaller than the window, in
            ceiling mode smaller by a step or more.
    """
    check_maps("avg_pool", x)
    check_whole(window=window, strides=strides)
    strides = window if strides is None else strides
    height, width = x.shape[1:3]
    smallest = max(window - 2 * padding - (strides - 1 if ceil_mode else 0), 1)
    if min(height, width) < smallest:
        raise ValueError(
            f"avg_pool: a window of {window}×{window} needs a map of at least {smallest} px in height "
            f"and width; got {height}×{width}. Use larger images or a smaller window."
        )
    fits = not ceil_mode or (height % window == 0 and width % window == 0)
    if strides == window and padding == 0 and fits:
        # Windows that neither overlap nor stick out: a reshape and a mean, several times faster than a window reduction.
        p, q = height // window, width // window
        windows = x[:, : p * window, : q * window].reshape(-1, p, window, q, window, x.shape[-1])
        return windows.mean(axis=(2, 4))
    rows, columns = (_windows(size, window, strides, padding, ceil_mode) for size in (height, width))
    accumulated = jnp.promote_types(x.dtype, jnp.float32)
    sums = lax.reduce_window(
        x.astype(accumulated),
        np.zeros((), accumulated),
        lax.add,
        window_dimensions=(1, window, window, 1),
        window_strides=(1, strides, strides, 1),
        padding=((0, 0), (padding, rows.high), (padding, columns.high), (0, 0)),
    )
    if count_include_pad:
        counts = np.multiply.outer(rows.padded, columns.padded)
    else:
        counts = np.multiply.outer(rows.inside, columns.inside)
    return (sums / counts[None, :, :, None].astype(accumulated)).astype(x.dtype)


class _Windows(NamedTuple):
    """The windows along one axis: padding needed at its end, and how many positions of each window count."""

    high: int
    padded: np.ndarray  # within the padded map
    inside: np.ndarray  # within the map itself


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
    """Take the largest value of each window as `torch.nn.functional.max_pool2d` does; padding never wins.

    Args:
        x: maps, `(n, h, w, c)`.
        window: height and width of the window, pixels.
        strides: step of the window.
        padding: pixels on each side, below every value.

    Returns:
        `(n, p, q, c)` with `p = (h + 2 padding - window) // strides + 1`.
    """
    # The taps of all windows, compared in turn: one fused pass either way. The gradient of a window reduction is a scatter,
    # on CPU twenty times slower. Of equal values the first wins and takes the gradient, and NaN wins over all, as in PyTorch.
    seen = taps(x, -np.inf, (window, window), strides, padding)
    largest = seen[0]
    for tap in seen[1:]:
        largest = jnp.where((tap > largest) | jnp.isnan(tap), tap, largest)
    return largest


def global_avg_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n c"]:
    """Average over all pixels: `(n, h, w, c)` to `(n, c)`, in the dtype of `x`."""
    return x.mean(axis=(1, 2))
