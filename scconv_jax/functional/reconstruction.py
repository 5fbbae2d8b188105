"""Spatial and channel reconstruction: the SRU, the CRU, and both in turn.

Paper: Li, Wen, He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023, pp. 6153-6162.
https://doi.org/10.1109/CVPR52729.2023.00596
Reference implementation: none by the authors. The public one, https://github.com/cheng-haha/ScConv, has three versions;
`scconv_jax/layers/variants.py` lists their options.

    SRU   GN(X) = γ (X - μ) / √(σ² + ε) + β                                         Eq. 1
          W = σ(γ / Σγ · GN(X))    W1, W2 = gate(W)                                 Eqs. 2-3
          X1 = W1 · X              X2 = W2 · X
          Y  = [X11 + X22, X12 + X21]       second index: half of the channels      Eq. 4
    CRU   [Xup; Xlow] = X          U = Xup ∗ squeeze1      L = Xlow ∗ squeeze2
          Y1 = U ∗ GWC + U ∗ PWC1                                                   Eq. 5
          Y2 = [L ∗ PWC2, L]                                                        Eq. 6
          S1, S2 = averages of Y1 and Y2 over all pixels                            Eq. 7
          β1, β2 = exp(S1), exp(S2) / (exp(S1) + exp(S2))                           Eq. 8
          Y  = β1 · Y1 + β2 · Y2                                                    Eq. 9

Differences: the paper does not define the number of groups, ε and the gates of weights at or below the threshold. These are
arguments, and so is each difference between the public versions and the paper.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.checks import check_channel, check_choice, check_maps, check_positive_int, check_spatial
from scconv_jax.functional.convolution import conv, reconstruction_conv
from scconv_jax.functional.pooling import avg_pool, global_avg_pool
from scconv_jax.functional.symbolic import value
from scconv_jax.shapes import Array, Float


def scconv(
    x: Float[Array, "n h w c"],
    gamma: Float[Array, " c"],
    beta: Float[Array, " c"],
    squeeze1: Float[Array, "1 1 u us"],
    squeeze2: Float[Array, "1 1 l ls"],
    gwc: Float[Array, "k k g o"],
    gwc_bias: Float[Array, " o"],
    pwc1: Float[Array, "1 1 us o"],
    pwc2: Float[Array, "1 1 ls p"] | None = None,
    projection: Float[Array, "1 1 o d"] | None = None,
    *,
    strides: int = 1,
    arrangement: Literal["S+C", "C+S", "S&C"] = "S+C",
    groups: int = 4,
    threshold: float = 0.5,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    gate: Literal["soft", "hard"] = "soft",
    inclusive: bool = False,
    gated: Literal["input", "norm"] = "input",
    floor: float = 1e-6,
    conv_groups: int = 2,
    dilation: int = 1,
    fuse: Literal["pair", "all"] = "pair",
) -> Array:
    """Apply ScConv, SRU then CRU (Li et al., CVPR 2023, Fig. 1). The defaults are those of the layer `ScConv`.

    Args:
        x: X, `(n, h, w, c)`.
        gamma: γ of the SRU, `(c,)`.
        beta: β of the SRU, `(c,)`.
        squeeze1: Kernel of the CRU; see `channel_reconstruction` for this and the next five.
        squeeze2: Kernel of the CRU.
        gwc: Kernel of the CRU.
        gwc_bias: Bias of the CRU.
        pwc1: Kernel of the CRU.
        pwc2: Kernel of the CRU, or None.
        projection: Kernel `(1, 1, o, d)` of a 1×1 convolution after the units, if the channels change.
        strides: s, strides of an average pool before the units.
        arrangement: "S+C" (SRU, then CRU), "C+S" (CRU, then SRU) or "S&C" (the sum of both).
        groups: See `spatial_reconstruction` for this and the next seven.
        threshold: Of the SRU.
        epsilon: Of the SRU.
        unbiased: Of the SRU.
        gate: Of the SRU.
        inclusive: Of the SRU.
        gated: Of the SRU.
        floor: Of the SRU.
        conv_groups: See `channel_reconstruction` for this and the next two.
        dilation: Of the CRU.
        fuse: Of the CRU.

    Returns:
        Y, `(n, ⌈h / s⌉, ⌈w / s⌉, o)`, or d channels with a projection.

    Raises:
        ValueError: If `x` does not have four axes, the channels of two arrays do not fit, or the arrangement is unknown.
    """
    check_maps("scconv", x)
    check_choice("arrangement", arrangement, ("S+C", "C+S", "S&C"))
    check_positive_int(strides=strides)
    if strides != 1:
        x = avg_pool(x, strides, ceil_mode=True, count_include_pad=False)
    sru = partial(
        spatial_reconstruction,
        gamma=gamma,
        beta=beta,
        groups=groups,
        threshold=threshold,
        epsilon=epsilon,
        unbiased=unbiased,
        gate=gate,
        inclusive=inclusive,
        gated=gated,
        floor=floor,
    )
    kernels = (squeeze1, squeeze2, gwc, gwc_bias, pwc1, pwc2)

    def cru(x: jax.Array) -> jax.Array:
        return channel_reconstruction(x, *kernels, conv_groups=conv_groups, dilation=dilation, fuse=fuse)

    y = cru(sru(x)) if arrangement == "S+C" else sru(cru(x)) if arrangement == "C+S" else sru(x) + cru(x)
    return y if projection is None else conv(y, projection)


def spatial_reconstruction(
    x: Float[Array, "n h w c"],
    gamma: Float[Array, " c"],
    beta: Float[Array, " c"],
    *,
    groups: int = 4,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    threshold: float = 0.5,
    gate: Literal["soft", "hard"] = "soft",
    inclusive: bool = False,
    gated: Literal["input", "norm"] = "input",
    floor: float = 1e-6,
) -> Float[Array, "n h w c"]:
    """Separate informative from redundant parts of a map and recombine them: SRU (Li et al., CVPR 2023, Eqs. 1-4).

    Args:
        x: X, `(n, h, w, c)`, c even.
        gamma: γ, scale of the group norm, `(c,)`. It also gives the channels' weights.
        beta: β, offset of the group norm, `(c,)`.
        groups: Groups of the group norm; must divide c.
        epsilon: ε, added to the variance, or to the standard deviation if `unbiased`.
        unbiased: Divide by the unbiased standard deviation plus ε, not by the root of the variance plus ε.
        threshold: t. Weights are between 0 and 1.
        gate: Weights W above t give W1 = 1 and W2 = 0. Other weights give W1 = W2 = W ("soft"), or W1 = 0 and W2 = 1 ("hard").
        inclusive: Treat a weight equal to t as above t.
        gated: The map that W1 and W2 multiply: X ("input") or GN(X) ("norm").
        floor: Smallest magnitude of Σγ; a smaller sum is replaced by this value with the same sign. The public code has 0.

    Returns:
        Y, of the shape and dtype of `x` (float32 for integer `x`). Statistics and gates are computed in float32, or in float64
        for float64 maps.

    Raises:
        ValueError: If `x` does not have four axes, c is odd or `groups` does not divide c.
    """
    x1, x2 = spatial_separation(
        x,
        gamma,
        beta,
        groups=groups,
        epsilon=epsilon,
        unbiased=unbiased,
        threshold=threshold,
        gate=gate,
        inclusive=inclusive,
        gated=gated,
        floor=floor,
    )
    # [X11 + X22, X12 + X21] = X1 + [X22, X21]
    swapped = x2.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)[..., ::-1, :].reshape(x.shape)
    y = x1 + swapped
    return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y


def spatial_separation(
    x: Float[Array, "n h w c"],
    gamma: Float[Array, " c"],
    beta: Float[Array, " c"],
    *,
    groups: int,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    threshold: float = 0.5,
    gate: Literal["soft", "hard"] = "soft",
    inclusive: bool = False,
    gated: Literal["input", "norm"] = "input",
    floor: float = 0.0,
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
    """Return X1 and X2, the informative and the redundant part of a map: the SRU's first half (Li et al., CVPR 2023, Eqs. 1-3).

    `spatial_reconstruction` documents the arguments and errors, and adds the two parts crosswise.

    Returns:
        X1 = W1 · X and X2 = W2 · X, each of the shape of `x`, float32, or float64 for float64 maps.
    """
    check_spatial(x, gamma, beta, groups=groups, threshold=threshold, epsilon=epsilon, gate=gate, gated=gated)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    gamma, beta = gamma.astype(wide.dtype), beta.astype(wide.dtype)
    mean, deviation = _group_statistics(wide, groups, epsilon, unbiased)
    scale = gamma[None] / deviation  # (n, c)
    total = gamma.sum()
    if floor:
        total = jnp.where(jnp.abs(total) < floor, jnp.where(total < 0, -floor, floor), total)
    weights = gamma / total  # (c,)

    # W is computed from X by one subtraction, one multiplication and one addition per element; GN(X) is computed only if it is
    # gated. The mean is subtracted, not folded into the offset, so that a constant map gives exactly β.
    def over(per_channel: jax.Array) -> jax.Array:
        axes = (0, 3) if per_channel.ndim == 2 else (3,)
        return lax.broadcast_in_dim(per_channel, x.shape, axes)

    centred = wide - over(mean)
    w = jax.nn.sigmoid(centred * over(scale * weights[None]) + over(beta * weights))
    above = w >= threshold if inclusive else w > threshold
    content = centred * over(scale) + over(beta) if gated == "norm" else wide
    below = w if gate == "soft" else 0.0
    x1 = jnp.where(above, 1.0, below) * content
    x2 = jnp.where(above, 0.0, below if gate == "soft" else 1.0) * content
    return x1, x2


def _group_statistics(
    x: Float[Array, "n h w c"], groups: int, epsilon: float, unbiased: bool
) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Return the mean and the divisor (deviation with ε) of each image's group of channels, repeated for each channel."""
    n, height, width, channels = x.shape
    size = channels // groups

    def per_group(sums: jax.Array) -> jax.Array:
        grouped = sums.reshape(n, groups, size).sum(axis=-1, keepdims=True)
        return jnp.broadcast_to(grouped, (n, groups, size)).reshape(n, channels)

    count = height * width * size
    mean = per_group(x.sum(axis=(1, 2))) / value(count, x.dtype)
    centred = x - lax.broadcast_in_dim(mean, x.shape, (0, 3))
    squares = per_group(jnp.square(centred).sum(axis=(1, 2)))
    if unbiased:
        return mean, _safe_sqrt(squares / jnp.maximum(value(count - 1, x.dtype), 1)) + epsilon
    return mean, jnp.sqrt(squares / value(count, x.dtype) + epsilon)


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """Return the square root. Its gradient at 0 is 0; that of `jnp.sqrt` is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def channel_reconstruction(
    x: Float[Array, "n h w c"],
    squeeze1: Float[Array, "1 1 u us"],
    squeeze2: Float[Array, "1 1 l ls"],
    gwc: Float[Array, "k k g o"],
    gwc_bias: Float[Array, " o"],
    pwc1: Float[Array, "1 1 us o"],
    pwc2: Float[Array, "1 1 ls p"] | None,
    *,
    conv_groups: int = 2,
    dilation: int = 1,
    fuse: Literal["pair", "all"] = "pair",
) -> Float[Array, "n h w o"]:
    """Split, transform and fuse the channels: CRU (Li et al., CVPR 2023, Eqs. 5-9).

    Args:
        x: X, `(n, h, w, c)`.
        squeeze1: `(1, 1, αc, αc / r)`. Its input channels are the upper part of X.
        squeeze2: `(1, 1, (1 - α)c, (1 - α)c / r)`.
        gwc: Group-wise kernel, `(k, k, αc / r / conv_groups, o)`, k odd.
        gwc_bias: `(o,)`.
        pwc1: `(1, 1, αc / r, o)`.
        pwc2: `(1, 1, (1 - α)c / r, o - (1 - α)c / r)`. None if it would have no output channels.
        conv_groups: g, groups of the group-wise convolution.
        dilation: Dilation of the group-wise convolution.
        fuse: Softmax over the two averages of each channel ("pair", Eq. 8), or over the 2 o averages of all channels ("all", as
            in the public code, which makes the output about o times smaller).

    Returns:
        Y, `(n, h, w, o)`, in the dtype of `x`.

    Raises:
        ValueError: If `x` does not have four axes, or the channels of two arrays do not fit.
    """
    y1, y2 = _transform(x, squeeze1, squeeze2, gwc, gwc_bias, pwc1, pwc2, conv_groups, dilation)
    weights = _weights(y1, y2, fuse)
    beta1, beta2 = (lax.broadcast_in_dim(weights[:, i], y1.shape, (0, 3)) for i in range(2))
    return beta1 * y1 + beta2 * y2


def channel_weights(
    x: Float[Array, "n h w c"],
    squeeze1: Float[Array, "1 1 u us"],
    squeeze2: Float[Array, "1 1 l ls"],
    gwc: Float[Array, "k k g o"],
    gwc_bias: Float[Array, " o"],
    pwc1: Float[Array, "1 1 us o"],
    pwc2: Float[Array, "1 1 ls p"] | None,
    *,
    conv_groups: int = 2,
    dilation: int = 1,
    fuse: Literal["pair", "all"] = "pair",
) -> Float[Array, "n two o"]:
    """Return β1 and β2, the weights with which the CRU adds Y1 and Y2 (Li et al., CVPR 2023, Eqs. 7-8).

    `channel_reconstruction` documents the arguments and errors.

    Returns:
        `(n, 2, o)`, in the dtype of `x`. With "pair", β1 + β2 is 1 for each channel; with "all", the sum over all channels is 1.
    """
    y1, y2 = _transform(x, squeeze1, squeeze2, gwc, gwc_bias, pwc1, pwc2, conv_groups, dilation)
    return _weights(y1, y2, fuse)


def _transform(
    x: Array,
    squeeze1: Array,
    squeeze2: Array,
    gwc: Array,
    gwc_bias: Array,
    pwc1: Array,
    pwc2: Array | None,
    conv_groups: int,
    dilation: int,
) -> tuple[Float[Array, "n h w o"], Float[Array, "n h w o"]]:
    """Return Y1 and Y2 (Eqs. 5-6)."""
    check_channel(x, squeeze1, squeeze2, gwc, gwc_bias, pwc1, pwc2, conv_groups, dilation)
    split = squeeze1.shape[2]
    upper = conv(x[..., :split], squeeze1)
    lower = conv(x[..., split:], squeeze2)
    y1 = reconstruction_conv(upper, gwc, pwc1, conv_groups=conv_groups, dilation=dilation)
    y1 = y1 + lax.broadcast_in_dim(gwc_bias, y1.shape, (3,))
    y2 = lower if pwc2 is None else jnp.concatenate([conv(lower, pwc2), lower], axis=-1)
    return y1, y2


def _weights(y1: Array, y2: Array, fuse: Literal["pair", "all"]) -> Float[Array, "n two o"]:
    check_choice("fuse", fuse, ("pair", "all"))
    averages = jnp.stack([global_avg_pool(y1), global_avg_pool(y2)], axis=1)  # (n, 2, o)
    return jax.nn.softmax(averages, axis=1 if fuse == "pair" else (1, 2))
