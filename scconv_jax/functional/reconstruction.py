"""Spatial and channel reconstruction (Li, Wen, He, CVPR 2023)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.checks import check_divides, check_maps, halves_exist
from scconv_jax.functional.convolution import conv, prefers_dense, reconstruction_kernel
from scconv_jax.functional.pooling import global_avg_pool
from scconv_jax.shapes import Array, Float


def spatial_reconstruction(
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
) -> Float[Array, "n h w c"]:
    """Separate a map into informative and redundant parts and cross them: SRU (Li et al., CVPR 2023, Eqs. 1-4).

        W  = σ(γ / Σγ · GN(X))         W1, W2 = gate(W)        X1 = W1 · X, X2 = W2 · X
        Y  = [X11 + X22, X12 + X21]    (second index: half of the channels)

    Args:
        x: X, maps `(n, h, w, c)`, c even.
        gamma: scale of the group norm, `(c,)`; also weighs the channels.
        beta: offset of the group norm, `(c,)`.
        groups: of the group norm; must divide c.
        epsilon: added to the variance, or with `unbiased` to the standard deviation.
        unbiased: divide by the unbiased standard deviation plus `epsilon`, not by the root of the variance plus `epsilon`.
        threshold: t, between 0 and 1.
        gate: what becomes of weights W. Above t, "soft" gives W1 = 1 and W2 = 0, "hard" the same; else "soft" gives
            W1 = W2 = W, "hard" W1 = 0 and W2 = 1.
        inclusive: a weight equal to t counts as above it.
        gated: what the gates multiply, X or GN(X).
        floor: least magnitude of Σγ; a smaller one is set to it, with its sign.

    Returns:
        Y, of the shape and dtype of `x` (float32 where that is no floating type). Statistics and gate are computed in float32
        at least.

    Raises:
        ValueError: if `x` has no four axes, c is odd or `groups` does not divide it.
    """
    check_maps("spatial_reconstruction", x)
    channels = x.shape[-1]
    halves_exist(channels)
    check_divides("groups", groups, "the channels", channels)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    gamma, beta = gamma.astype(wide.dtype), beta.astype(wide.dtype)
    mean, deviation = _group_statistics(wide, groups, epsilon, unbiased)
    scale = gamma[None] / deviation  # (n, c)
    total = gamma.sum()
    if floor:
        total = jnp.where(jnp.abs(total) < floor, jnp.where(total < 0, -floor, floor), total)
    weights = gamma / total  # (c,)

    # W comes from X by one subtraction, one multiplication and one addition per element; GN(X) itself is needed only where it is
    # gated. The mean is subtracted, not multiplied into the offset, so that equal values give exactly β.
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
    # [X11 + X22, X12 + X21] = X1 + [X22, X21]
    swapped = x2.reshape(*x.shape[:-1], 2, channels // 2)[..., ::-1, :].reshape(x.shape)
    y = x1 + swapped
    return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y


def _group_statistics(
    x: Float[Array, "n h w c"], groups: int, epsilon: float, unbiased: bool
) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Mean of each image's group of channels, and what to divide by, repeated for each channel."""
    n, height, width, channels = x.shape
    size = channels // groups

    def per_group(sums: jax.Array) -> jax.Array:
        grouped = sums.reshape(n, groups, size).sum(axis=-1, keepdims=True)
        return jnp.broadcast_to(grouped, (n, groups, size)).reshape(n, channels)

    count = height * width * size
    mean = per_group(x.sum(axis=(1, 2))) / count
    centred = x - lax.broadcast_in_dim(mean, x.shape, (0, 3))
    squares = per_group(jnp.square(centred).sum(axis=(1, 2)))
    if unbiased:
        return mean, _safe_sqrt(squares / max(count - 1, 1)) + epsilon
    return mean, jnp.sqrt(squares / count + epsilon)


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root whose gradient at 0 is 0, not infinite."""
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

        [Xup; Xlow] = X    U = Xup ∗ squeeze1    L = Xlow ∗ squeeze2
        Y1 = U ∗ GWC + U ∗ PWC1                  Y2 = [L ∗ PWC2, L]
        β1, β2 = softmax of the maps' averages   Y  = β1 · Y1 + β2 · Y2

    Args:
        x: X, maps `(n, h, w, c)`.
        squeeze1: `(1, 1, αc, αc / r)`; its input channels say where X is split.
        squeeze2: `(1, 1, (1 - α)c, (1 - α)c / r)`.
        gwc: `(k, k, αc / r / conv_groups, o)`, k odd.
        gwc_bias: `(o,)`.
        pwc1: `(1, 1, αc / r, o)`.
        pwc2: `(1, 1, (1 - α)c / r, o - (1 - α)c / r)`; None where that is no channel at all.
        conv_groups: g, of the group-wise convolution.
        dilation: of the group-wise convolution.
        fuse: over what the softmax is taken, for each image: "pair", the two averages of each channel (Eq. 8), or "all", the
            2 o averages of all channels, as in the public code, which makes the output about o times smaller.

    Returns:
        Y, `(n, h, w, o)`.
    """
    split = squeeze1.shape[2]
    upper = conv(x[..., :split], squeeze1)
    lower = conv(x[..., split:], squeeze2)
    options = {"padding": dilation * (gwc.shape[0] // 2), "dilation": dilation}
    if prefers_dense(conv_groups, upper.shape[-1]):
        y1 = conv(upper, reconstruction_kernel(gwc, pwc1, conv_groups), **options)
    else:
        y1 = conv(upper, gwc, groups=conv_groups, **options) + conv(upper, pwc1)
    y1 = y1 + lax.broadcast_in_dim(gwc_bias, y1.shape, (3,))
    y2 = lower if pwc2 is None else jnp.concatenate([conv(lower, pwc2), lower], axis=-1)
    averages = jnp.stack([global_avg_pool(y1), global_avg_pool(y2)], axis=1)  # (n, 2, o)
    weights = jax.nn.softmax(averages, axis=1 if fuse == "pair" else (1, 2))
    beta1, beta2 = (lax.broadcast_in_dim(weights[:, i], y1.shape, (0, 3)) for i in range(2))
    return beta1 * y1 + beta2 * y2
