"""Self-calibrated convolution (SC-Conv), given any four convolutions K1 to K4.

Paper: Liu, Hou, Cheng, Wang, Feng, "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020,
pp. 10096-10105.
https://openaccess.thecvf.com/content_CVPR_2020/html/Liu_Improving_Convolutional_Networks_With_Self-Calibrated_Convolutions_CVPR_2020_paper.html
Reference implementation: https://github.com/MCG-NKU/SCNet

    [X1; X2] = X                      halves of the channels
    T1  = AvgPool_r(X1)               r = 4
    X1' = Up(T1 ∗ K2)                 nearest neighbour
    Y1' = (X1 ∗ K3) · σ(X1 + X1')
    Y1  = Y1' ∗ K4
    Y2  = X2 ∗ K1
    Y   = [Y1; Y2]

Differences: none.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from scconv_jax.functional.checks import check_even
from scconv_jax.functional.pooling import avg_pool
from scconv_jax.functional.resizing import resize_nearest
from scconv_jax.shapes import Array, Float

Branch = Callable[[Array], Array]


def self_calibration(x: Float[Array, "n h w c"], k2: Branch, k3: Branch, k4: Branch, *, pooling: int = 4) -> Array:
    """Apply the calibrated branch, X1 to Y1 (Liu et al., CVPR 2020, Eqs. 3-6).

    Args:
        x: X1, `(n, h, w, c)`.
        k2: Function from `(n, h // pooling, w // pooling, c)` to the same shape: a convolution, with its norm if it has one.
        k3: Function from `(n, h, w, c)` to the same shape.
        k4: Function from `(n, h, w, c)`; the only one that may have strides.
        pooling: r, window and step of the average pool, in pixels.

    Returns:
        Y1, the output of `k4`.

    Raises:
        ValueError: If `x` is smaller than the pooling window.

    Example:
        With plain arrays, `k2 = functools.partial(conv, kernel=w2, padding=1)`, and the same for `k3` and `k4`.
    """
    context = resize_nearest(k2(avg_pool(x, pooling)), (x.shape[1], x.shape[2]))
    return k4(k3(x) * jax.nn.sigmoid(x + context))


def self_calibrated_conv(
    x: Float[Array, "n h w c"], k1: Branch, k2: Branch, k3: Branch, k4: Branch, *, pooling: int = 4
) -> Array:
    """Apply the self-calibrated convolution, X to Y (Liu et al., CVPR 2020, Fig. 2).

    Args:
        x: X, `(n, h, w, c)`, c even.
        k1: Function of X2, `(n, h, w, c / 2)`, with the same strides as `k4`.
        k2: See `self_calibration`.
        k3: See `self_calibration`.
        k4: See `self_calibration`.
        pooling: r, window and step of the average pool, in pixels.

    Returns:
        Y, the channels of Y1 followed by those of Y2.

    Raises:
        ValueError: If c is odd, or `x` is smaller than the pooling window.
    """
    x1, x2 = halves(x)
    return jnp.concatenate([self_calibration(x1, k2, k3, k4, pooling=pooling), k1(x2)], axis=-1)


def halves(x: Float[Array, "n h w c"]) -> tuple[Float[Array, "n h w d"], Float[Array, "n h w d"]]:
    """Split the channels in the middle: `(n, h, w, c)` to two arrays `(n, h, w, c / 2)`.

    Source: the split [X1; X2] = X of Liu et al., CVPR 2020.

    Raises:
        ValueError: If c is odd.
    """
    channels = x.shape[-1]
    check_even(channels)
    return x[..., : channels // 2], x[..., channels // 2 :]
