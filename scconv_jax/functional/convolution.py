"""Convolution by the rules of PyTorch. The form in which a convolution is computed is decided here and nowhere else."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scconv_jax.functional.checks import check_maps
from scconv_jax.shapes import Array, Float


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
        seen = taps(x, 0.0, reach, strides, padding, dilation)
        weights = kernel.reshape(-1, features)
        products = [tap * lax.broadcast_in_dim(w, tap.shape, (3,)) for tap, w in zip(seen, weights, strict=True)]
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


def taps(
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


def reconstruction_kernel(
    gwc: Float[Array, "k k g o"], pwc1: Float[Array, "1 1 i o"], conv_groups: int
) -> Float[Array, "k k i o"]:
    """Assemble the group-wise and the point-wise kernel of a CRU into that of one ordinary convolution: one pass, no sum."""
    margin = gwc.shape[0] // 2
    return dense_kernel(gwc, conv_groups) + jnp.pad(pwc1, ((margin, margin), (margin, margin), (0, 0), (0, 0)))


def prefers_dense(conv_groups: int, channels: int) -> bool:
    """Whether a CRU's group-wise and point-wise convolution, of so many channels, are computed as one ordinary one.

    That is one pass over the maps, at the price of products with the zeros between the groups. On CPU the price is too high
    from 16 channels a group on (`python -m benchmarks.operators`); elsewhere, where it was not measured, above 8 groups.
    """
    return (jax.default_backend() != "cpu" and conv_groups <= 8) or dense_blocks(conv_groups, channels) == 1
