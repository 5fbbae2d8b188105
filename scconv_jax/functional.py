"""The operators as pure functions of arrays: no Flax, usable from any JAX library, under `jax.jit`, `jax.grad`, `jax.vmap`.

Images are `(n, h, w, c)`, convolution kernels `(h, w, c_in / groups, c_out)`; every function works in the dtype of its input.

    2020: self_calibration, self_calibrated_conv             Liu et al., CVPR 2020
    2023: spatial_reconstruction, channel_reconstruction     Li, Wen, He, CVPR 2023
    PyTorch's rules, from `scconv_jax.spatial`: conv, avg_pool, max_pool, global_avg_pool, resize_nearest
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax import lax

from scconv_jax.spatial import (
    avg_pool,
    check_maps,
    check_whole,
    conv,
    dense_blocks,
    dense_kernel,
    global_avg_pool,
    max_pool,
    resize_nearest,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Branch = Callable[[Array], Array]

__all__ = [
    "avg_pool",
    "channel_reconstruction",
    "conv",
    "global_avg_pool",
    "halves",
    "max_pool",
    "resize_nearest",
    "self_calibrated_conv",
    "self_calibration",
    "spatial_reconstruction",
]


def self_calibration(x: Float[Array, "n h w c"], k2: Branch, k3: Branch, k4: Branch, *, pooling: int = 4) -> Array:
    """Calibrate a convolution by the map's own surroundings (Liu et al., CVPR 2020, Eqs. 3-6).

        T1 = AvgPool_r(X1)    X1' = Up(T1 ∗ K2)    Y1' = (X1 ∗ K3) · σ(X1 + X1')    Y1 = Y1' ∗ K4

    Args:
        x: X1, maps `(n, h, w, c)`.
        k2: convolution `(n, h / pooling, w / pooling, c)` to the same shape, with whatever normalisation follows it.
        k3: convolution `(n, h, w, c)` to the same shape.
        k4: convolution of the calibrated map; it alone may have strides.
        pooling: r, the window and step of the average pool, pixels.

    Returns:
        Y1, what `k4` returns.

    Raises:
        ValueError: if the map is smaller than the pooling window.

    Example:
        With plain arrays, no framework: `k2 = functools.partial(conv, kernel=w2, padding=1)`, and so on.
    """
    context = resize_nearest(k2(avg_pool(x, pooling)), (x.shape[1], x.shape[2]))
    return k4(k3(x) * jax.nn.sigmoid(x + context))


def self_calibrated_conv(
    x: Float[Array, "n h w c"], k1: Branch, k2: Branch, k3: Branch, k4: Branch, *, pooling: int = 4
) -> Array:
    """Apply the whole operator of Liu et al. (CVPR 2020, Fig. 2): half the channels calibrated, half convolved.

        [X1; X2] = X    Y1 = calibrate(X1)    Y2 = X2 ∗ K1    Y = [Y1; Y2]

    Args:
        x: X, maps `(n, h, w, c)`, c even.
        k1: convolution of X2, `(n, h, w, c / 2)`, with the strides of `k4`.
        k2: see `self_calibration`; so for `k3` and `k4`.
        k3: see there.
        k4: see there.
        pooling: r.

    Returns:
        Y, the channels of Y1 before those of Y2.

    Raises:
        ValueError: if c is odd, or the map is smaller than the pooling window.
    """
    x1, x2 = halves(x)
    return jnp.concatenate([self_calibration(x1, k2, k3, k4, pooling=pooling), k1(x2)], axis=-1)


def halves(x: Float[Array, "n h w c"]) -> tuple[Float[Array, "n h w d"], Float[Array, "n h w d"]]:
    """Split the channels in the middle.

    Raises:
        ValueError: if their number is odd.
    """
    channels = x.shape[-1]
    halves_exist(channels)
    return x[..., : channels // 2], x[..., channels // 2 :]


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


def halves_exist(channels: int) -> None:
    """Raise a ValueError where channels cannot be split in two halves."""
    if channels % 2:
        raise ValueError(
            f"The channels are split in two halves; {channels} is odd. Use {channels - 1} or {channels + 1} channels."
        )


def check_odd(**sizes: int) -> None:
    """Raise a ValueError unless each size of a kernel is odd, so that it has a centre, and padding that keeps a map's size."""
    check_whole(**sizes)
    for name, size in sizes.items():
        if size % 2 == 0:
            raise ValueError(f"{name}={size} must be odd, for the kernel to have a centre. Use {size - 1} or {size + 1}.")


def check_divides(name: str, divisor: int, what: str, *channels: int) -> None:
    """Raise a ValueError, naming the nearest values that would do, unless `divisor` divides all of `channels`."""
    common = math.gcd(*channels)
    if divisor < 1 or common % divisor:
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        nearest = [
            max((d for d in divisors if d < divisor), default=None),
            min((d for d in divisors if d > divisor), default=None),
        ]
        raise ValueError(
            f"{name}={divisor} must divide {what}, {' and '.join(map(str, channels))}. "
            f"Nearest that do: {' and '.join(str(d) for d in nearest if d)}."
        )
