"""2D convolution with PyTorch's rules, and the choice of the form in which it is computed.

Reference: `torch.nn.functional.conv2d`, https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv2d.html

    y[n, p, q, o] = Σ_ijc x[n, s p + d i - P, s q + d j - P, c] · kernel[i, j, c, o]     s strides, d dilation, P padding

XLA computes some convolutions slowly, so `conv` gives it another form of the same sum:

    1×1, no padding            a matmul over pixels
    depthwise                  a sum of shifted products
    grouped                    up to eight dense convolutions, of at least 16 channels each
    GWC + PWC1 of a CRU        one dense convolution where that is faster (`prefers_dense`)
    any other                  `lax.conv_general_dilated`

Differences: layouts are channels-last, and strides, padding and dilation are one number for height and width.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.checks import check_maps
from scconv_jax.functional.windows import taps
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
    """Convolve as `torch.nn.functional.conv2d` does.

    Args:
        x: Maps, `(n, h, w, c)`.
        kernel: `(kh, kw, c / groups, o)`, of the same dtype as `x`.
        strides: Step of the window along height and width.
        padding: Zeros added on each of the four sides.
        dilation: Distance between two taps of the kernel.
        groups: Number of groups of channels; each group is convolved separately.

    Returns:
        `(n, p, q, o)` with `p = (h + 2 padding - dilation (kh - 1) - 1) // strides + 1`, in the dtype of `x`.

    Raises:
        ValueError: If `x` does not have four axes, or its channels do not fit the kernel.
    """
    check_maps("conv", x)
    channels, (kh, kw, per_group, _) = x.shape[-1], kernel.shape
    if channels != per_group * groups:
        raise ValueError(
            f"conv: the input has {channels} channels, but a kernel of shape {kernel.shape} with groups={groups} takes "
            f"{per_group * groups}."
        )
    if (kh, kw, padding, groups) == (1, 1, 0, 1):
        # On CPU, as a convolution it takes two to six times as long, forward and backward.
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
    """Convolve in groups by dense convolutions, or by shifted products if each channel is its own group.

    On CPU, the backward pass of XLA's own grouped convolution takes up to two hundred times as long
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
    """Return the number of dense convolutions to compute a grouped one by: at most 8, each of at least 16 channels."""
    fitting = [n for n in range(1, 9) if groups % n == 0 and channels // n >= 16]
    return max(fitting, default=1)


def dense_kernel(kernel: Float[Array, "kh kw i o"], groups: int) -> Float[Array, "kh kw c o"]:
    """Return the dense kernel equal to a grouped one: zeros connect channels of different groups."""
    size, per_group = kernel.shape[2], kernel.shape[3] // groups
    blocks = [
        jnp.pad(kernel[..., i * per_group : (i + 1) * per_group], ((0, 0), (0, 0), (i * size, (groups - 1 - i) * size), (0, 0)))
        for i in range(groups)
    ]
    return jnp.concatenate(blocks, axis=-1)


def reconstruction_kernel(
    gwc: Float[Array, "k k g o"], pwc1: Float[Array, "1 1 i o"], conv_groups: int
) -> Float[Array, "k k i o"]:
    """Return the dense kernel equal to the sum of a CRU's group-wise (GWC) and point-wise (PWC1) convolutions."""
    margin = gwc.shape[0] // 2
    return dense_kernel(gwc, conv_groups) + jnp.pad(pwc1, ((margin, margin), (margin, margin), (0, 0), (0, 0)))


def prefers_dense(conv_groups: int, channels: int) -> bool:
    """Return whether a CRU of this many squeezed channels computes GWC + PWC1 as one dense convolution.

    The dense form reads the maps once but also multiplies the zeros between groups. On CPU it is slower from 16 channels per
    group upwards (`python -m benchmarks.operators`). On accelerators it is used for up to 8 groups.
    """
    return (jax.default_backend() != "cpu" and conv_groups <= 8) or dense_blocks(conv_groups, channels) == 1
