"""Convolution, pooling and resizing by PyTorch's rules, as pure functions of arrays.

JAX has functions of the same names whose results differ from PyTorch's (padding of strided convolutions, the index rule of
nearest-neighbour resizing, what an average over padding is divided by). Checkpoints were trained with PyTorch's rules, so
those are written out here once. Users find these functions in `scconv_jax.functional`.
"""

from __future__ import annotations

import functools
import operator
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def check_whole(**values: Any) -> None:
    """Raise a ValueError unless each value, where it is given, is a whole number of 1 or more."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            hint = " It holds for height and width alike." if isinstance(value, tuple) else ""
            raise ValueError(f"{name}={value!r} must be one whole number, 1 or more.{hint}")


def check_maps(function: str, x: Array) -> None:
    """Raise a ValueError unless `x` has the four axes of maps, `(n, h, w, c)`."""
    if x.ndim != 4:
        hint = " For one map by itself, x[None] adds the first axis." if x.ndim == 3 else ""
        raise ValueError(f"{function}: expected maps of shape (n, h, w, c), channels last; got {x.shape}.{hint}")


def conv(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    strides: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Array, "n p q o"]:
    """Convolve as `torch.nn.functional.conv2d` does: `padding` zeros on every side.

    Args:
        x: images, `(n, h, w, c)`.
        kernel: `(kh, kw, c / groups, o)`.
        strides: step of the window, the same along height and width; so for `padding` and `dilation`.
        padding: zeros added on each of the four sides.
        dilation: distance between the kernel's taps.
        groups: the channels are cut into this many runs, each convolved by itself.

    Returns:
        `(n, p, q, o)` with `p = (h + 2 padding - dilation (kh - 1) - 1) // strides + 1`.

    Raises:
        ValueError: if `x` has no four axes, or its channels do not fit the kernel.
    """
    check_maps("conv", x)
    channels, (kh, kw, per_group, _) = x.shape[-1], kernel.shape
    if channels != per_group * groups:
        raise ValueError(
            f"conv: the input has {channels} channels; a kernel of shape {kernel.shape} with groups={groups} takes "
            f"{per_group * groups}."
        )
    if (kh, kw, padding, groups) == (1, 1, 0, 1):
        # A 1×1 convolution is a matmul over pixels. Flattened to two dimensions it runs at the matmul's rate on CPU,
        # forward and backward; as a convolution it takes two to six times as long.
        x = x[:, ::strides, ::strides]
        return (x.reshape(-1, channels) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    if groups > 1:
        return _grouped_conv(x, kernel, strides, padding, dilation, groups)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _grouped_conv(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw i o"], strides: int, padding: int, dilation: int, groups: int
) -> Float[Array, "n p q o"]:
    """Convolve in groups by ordinary convolutions, or by products where each channel is its own group.

    XLA's own grouped convolution takes on CPU up to two hundred times as long in the backward pass
    (`python -m benchmarks.operators`).
    """
    channels, features = x.shape[-1], kernel.shape[-1]
    if groups == channels == features:
        reach = (dilation * (kernel.shape[0] - 1) + 1, dilation * (kernel.shape[1] - 1) + 1)
        taps = _taps(x, 0.0, reach, strides, padding, dilation)
        weights = kernel.reshape(-1, features)
        products = [tap * lax.broadcast_in_dim(w, tap.shape, (3,)) for tap, w in zip(taps, weights, strict=True)]
        return functools.reduce(operator.add, products)
    blocks = dense_blocks(groups, channels)
    options = {"strides": strides, "padding": padding, "dilation": dilation}
    inputs, outputs = channels // blocks, features // blocks
    return jnp.concatenate(
        [
            conv(
                x[..., i * inputs : (i + 1) * inputs],
                dense_kernel(kernel[..., i * outputs : (i + 1) * outputs], groups // blocks),
                **options,
            )
            for i in range(blocks)
        ],
        axis=-1,
    )


def dense_blocks(groups: int, channels: int) -> int:
    """Into how many ordinary convolutions a grouped one is best merged: at most 8, each of 16 channels at least."""
    fitting = [n for n in range(1, 9) if groups % n == 0 and channels // n >= 16]
    return max(fitting, default=1)


def dense_kernel(kernel: Float[Array, "kh kw i o"], groups: int) -> Float[Array, "kh kw c o"]:
    """Write the kernel of a grouped convolution as that of an ordinary one, with zeros between the groups."""
    size, per_group = kernel.shape[2], kernel.shape[3] // groups
    blocks = [
        jnp.pad(kernel[..., i * per_group : (i + 1) * per_group], ((0, 0), (0, 0), (i * size, (groups - 1 - i) * size), (0, 0)))
        for i in range(groups)
    ]
    return jnp.concatenate(blocks, axis=-1)


def _taps(
    x: Float[Array, "n h w c"], fill: float, window: tuple[int, int], strides: int, padding: int, dilation: int = 1
) -> list[Float[Array, "n p q c"]]:
    """List what each position of a window sees as it moves over the padded map, row by row; `window` is its whole reach."""
    margins = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
    padded = lax.pad(x, np.array(fill, x.dtype), margins)
    last = [(padded.shape[axis] - reach) // strides * strides for axis, reach in zip((1, 2), window, strict=True)]
    return [
        padded[:, i : i + last[0] + 1 : strides, j : j + last[1] + 1 : strides]
        for i in range(0, window[0], dilation)
        for j in range(0, window[1], dilation)
    ]


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
    taps = _taps(x, -np.inf, (window, window), strides, padding)
    largest = taps[0]
    for tap in taps[1:]:
        largest = jnp.where((tap > largest) | jnp.isnan(tap), tap, largest)
    return largest


def global_avg_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n c"]:
    """Average over all pixels: `(n, h, w, c)` to `(n, c)`, in the dtype of `x`."""
    return x.mean(axis=(1, 2))


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
