"""Self-calibrated convolution (Liu et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from scconv_jax.functional.checks import halves_exist
from scconv_jax.functional.pooling import avg_pool
from scconv_jax.functional.resizing import resize_nearest
from scconv_jax.shapes import Array, Float

Branch = Callable[[Array], Array]


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
