"""2D convolution with PyTorch's rules, in the form that is fastest on each platform.

Reference: `torch.nn.functional.conv2d`, https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.conv2d.html

    y[n, p, q, o] = Σ_ijc x[n, s p + d i - P, s q + d j - P, c] · kernel[i, j, c, o]     s strides, d dilation, P padding

On accelerators every convolution is XLA's own, `native_conv`. On CPU, XLA compiles some convolutions to slow programs, so they
have other forms there. `by_platform` selects the form for the platform that the program is compiled for:

    convolution                      CPU                                                      accelerators
    1×1, no padding                  `matmul_conv`: a matmul over pixels                      `native_conv`
    depthwise                        `product_conv`: a sum of shifted products                `native_conv`
    grouped                          `blocked_conv`: up to eight dense convolutions           `native_conv`
    any other                        `native_conv`                                            `native_conv`
    3×3 of a fused network           F(4×4, 3×3) of a constant kernel: `fusion/winograd.py`   `native_conv`
    two 1×1 of the same input        two matmuls: `twin_convs`                                one `native_conv`
    GWC + PWC1 of a CRU              one dense convolution if `dense_blocks` is 1,            one if CPU has one or groups <= 8,
                                     else two convolutions                                    else two convolutions

Differences: layouts are channels-last, and strides, padding and dilation are the same for height and width.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.checks import check_maps, check_padding, check_positive_int
from scconv_jax.functional.platforms import by_platform
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
    check_positive_int(strides=strides, dilation=dilation, groups=groups)
    check_padding(padding)
    channels, per_group = x.shape[-1], kernel.shape[2]
    if channels != per_group * groups:
        hint = " Kernels are (kh, kw, i, o): PyTorch's are (o, i, kh, kw)." if kernel.shape[1] == channels // groups else ""
        raise ValueError(
            f"conv: the input has {channels} channels, but a kernel of shape {kernel.shape} with groups={groups} takes "
            f"{per_group * groups}.{hint}"
        )
    options: dict[str, Any] = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    form = form_on_cpu(kernel.shape, padding, groups)
    if form is native_conv:
        return native_conv(kernel, x, **options)
    # Split the channels before choosing the platform. Splitting them inside would change the order in which gradients of `x` are
    # added, and so the rounding, and runs of earlier versions would not resume bit for bit.
    size = channels // (dense_blocks(groups, channels) if form is blocked_conv else 1)
    parts = [x[..., i : i + size] for i in range(0, channels, size)] if size < channels else [x]
    return by_platform(form, native_conv, kernel, *parts, **options)


def form_on_cpu(shape: tuple[int, ...], padding: int, groups: int) -> Callable[..., Array]:
    """Return the fastest form on CPU of a convolution whose kernel has this shape (`python -m benchmarks.operators`)."""
    kh, kw, per_group, features = shape
    if groups > 1:
        return product_conv if per_group == 1 and groups == features else blocked_conv
    return matmul_conv if (kh, kw, padding) == (1, 1, 0) else native_conv


def native_conv(
    kernel: Float[Array, "kh kw i o"],
    *parts: Float[Array, "n h w _"],
    strides: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Float[Array, "n p q o"]:
    """Convolve with XLA's own operation. The parts of the channels are joined."""
    return lax.conv_general_dilated(
        jnp.concatenate(parts, axis=-1),
        kernel,
        window_strides=(strides, strides),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def matmul_conv(
    kernel: Float[Array, "1 1 c o"], x: Float[Array, "n h w c"], *, strides: int, padding: int, dilation: int, groups: int
) -> Float[Array, "n p q o"]:
    """Convolve 1×1 with a matmul over pixels. On CPU, `native_conv` takes two to six times as long, forward and backward.

    On NVIDIA GPUs, XLA of jax 0.10 and 0.11 aborts the process when it compiles the gradient of this form with strides.
    """
    del padding, dilation, groups
    x = lax.slice(x, (0, 0, 0, 0), x.shape, (1, strides, strides, 1))
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def twin_convs(
    x: Float[Array, "n h w c"], kernel_a: Float[Array, "1 1 c a"], kernel_b: Float[Array, "1 1 c b"]
) -> tuple[Float[Array, "n h w a"], Float[Array, "n h w b"]]:
    """Convolve `x` 1×1 with each of two kernels. On accelerators it is one convolution, which reads `x` once.

    Its gradients read and write `x` once too. On CPU, one convolution and two slices are slower than two matmuls.
    """
    # On CPU, the two are given `x` separately, and b first. Its gradients are then added in the order of two calls of `conv`.
    return by_platform(separate_twins, joined_twins, x, x, kernel_a, kernel_b)


def separate_twins(x_b: Array, x_a: Array, kernel_a: Array, kernel_b: Array) -> tuple[Array, Array]:
    """Convolve with two matmuls."""
    options: dict[str, Any] = {"strides": 1, "padding": 0, "dilation": 1, "groups": 1}
    return matmul_conv(kernel_a, x_a, **options), matmul_conv(kernel_b, x_b, **options)


def joined_twins(x: Array, _: Array, kernel_a: Array, kernel_b: Array) -> tuple[Array, Array]:
    """Convolve once and separate the channels."""
    kernel = jnp.concatenate([kernel_a, kernel_b], axis=-1)
    y = native_conv(kernel, x, strides=1, padding=0, dilation=1, groups=1)
    return y[..., : kernel_a.shape[-1]], y[..., kernel_a.shape[-1] :]


def product_conv(
    kernel: Float[Array, "kh kw 1 c"], x: Float[Array, "n h w c"], *, strides: int, padding: int, dilation: int, groups: int
) -> Float[Array, "n p q c"]:
    """Convolve each channel separately, as a sum of shifted products. On CPU, the gradient of `native_conv` is far slower."""
    del groups
    reach = (dilation * (kernel.shape[0] - 1) + 1, dilation * (kernel.shape[1] - 1) + 1)
    seen = taps(x, 0.0, reach, strides, padding, dilation)
    weights = kernel.reshape(-1, kernel.shape[-1])
    products = [tap * lax.broadcast_in_dim(w, tap.shape, (3,)) for tap, w in zip(seen, weights, strict=True)]
    return functools.reduce(operator.add, products)


def blocked_conv(
    kernel: Float[Array, "kh kw i o"],
    *parts: Float[Array, "n h w c"],
    strides: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Float[Array, "n p q o"]:
    """Convolve parts of the channels with dense convolutions. On CPU, `native_conv` has a gradient up to 200 times as slow."""
    blocks, inputs, outputs = len(parts), parts[0].shape[-1], kernel.shape[-1] // len(parts)
    dense = form_on_cpu((*kernel.shape[:2], inputs, outputs), padding, 1)
    options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": 1}
    kernels = (dense_kernel(kernel[..., i * outputs : (i + 1) * outputs], groups // blocks) for i in range(blocks))
    return jnp.concatenate([dense(block, part, **options) for part, block in zip(parts, kernels, strict=True)], axis=-1)


def dense_blocks(groups: int, channels: int) -> int:
    """Return into how many dense convolutions to split a grouped one: at most 8, each of at least 16 channels."""
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


def reconstruction_conv(
    x: Float[Array, "n h w i"],
    gwc: Float[Array, "k k g o"],
    pwc1: Float[Array, "1 1 i o"],
    *,
    conv_groups: int,
    dilation: int,
) -> Float[Array, "n h w o"]:
    """Return the sum of a CRU's group-wise (GWC) and point-wise (PWC1) convolutions of `x`, in one or two convolutions."""
    # The dense form reads the maps once, but also multiplies the zeros between groups.
    on_cpu = joined_conv if dense_blocks(conv_groups, x.shape[-1]) == 1 else separate_convs
    on_accelerators = joined_conv if conv_groups <= 8 else on_cpu
    options: dict[str, Any] = {"conv_groups": conv_groups, "dilation": dilation}
    if on_cpu is on_accelerators:
        return on_cpu(x, gwc, pwc1, **options)
    return by_platform(on_cpu, on_accelerators, x, gwc, pwc1, **options)


def joined_conv(x: Array, gwc: Array, pwc1: Array, *, conv_groups: int, dilation: int) -> Array:
    """Apply GWC and PWC1 in one dense convolution."""
    return conv(x, reconstruction_kernel(gwc, pwc1, conv_groups), padding=dilation * (gwc.shape[0] // 2), dilation=dilation)


def separate_convs(x: Array, gwc: Array, pwc1: Array, *, conv_groups: int, dilation: int) -> Array:
    """Apply GWC and PWC1 in two convolutions."""
    return conv(x, gwc, padding=dilation * (gwc.shape[0] // 2), dilation=dilation, groups=conv_groups) + conv(x, pwc1)


def reconstruction_kernel(
    gwc: Float[Array, "k k g o"], pwc1: Float[Array, "1 1 i o"], conv_groups: int
) -> Float[Array, "k k i o"]:
    """Return the dense kernel equal to the sum of a CRU's group-wise (GWC) and point-wise (PWC1) convolutions."""
    margin = gwc.shape[0] // 2
    return dense_kernel(gwc, conv_groups) + jnp.pad(pwc1, ((margin, margin), (margin, margin), (0, 0), (0, 0)))
