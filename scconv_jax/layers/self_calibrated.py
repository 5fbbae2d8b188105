"""Self-calibrated convolutions (SC-Conv).

Paper: Liu, Hou, Cheng, Wang, Feng, "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020,
pp. 10096-10105. Reference implementation: https://github.com/MCG-NKU/SCNet.

    [X1; X2] = X
    T1  = AvgPool_r(X1)               the surroundings, r = 4
    X1' = Up(T1 ∗ K2)                 nearest neighbour
    Y1' = (X1 ∗ K3) · σ(X1 + X1')     calibration
    Y1  = Y1' ∗ K4
    Y2  = X2 ∗ K1
    Y   = [Y1; Y2]

Every K is a 3×3 convolution without bias followed by batch normalisation, as in the reference implementation. Strides are
on K1 and K4; dilation and groups apply to all four.

Differences: none. The reference implementation's class `SCConv` is `SelfCalibration` here; its networks hold K1 beside it
and concatenate in the other order (see `scnet.py`).
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_whole
from scconv_jax.layers.core import BatchNorm, ConvNorm, Dtype, Factory
from scconv_jax.shapes import Array, Float


class SelfCalibration(nn.Module):
    """The calibrated branch, X1 to Y1: `(n, h, w, c)` to `(n, h / strides, w / strides, c)`.

    Attributes:
        features: c, channels of input and output.
        strides: of K4.
        dilation: of K2, K3 and K4.
        groups: of K2, K3 and K4.
        pooling: r, window and step of the average pool, pixels; height and width must not be smaller.
        norm: factory of the norm that follows each convolution.
        dtype: of the computation.

    Raises:
        ValueError: if the input has other than `features` channels, or is smaller than `pooling`.
    """

    features: int
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    pooling: int = 4
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q c"]:
        """Calibrate; `train` is the norms'."""
        _check_channels(self, x.shape[-1])
        k = partial(ConvNorm, self.features, dilation=self.dilation, groups=self.groups, norm=self.norm, dtype=self.dtype)
        k2 = partial(k(first=1, name="k2"), train=train)  # in the reference's Sequential the pool comes first
        k3 = partial(k(name="k3"), train=train)
        k4 = partial(k(strides=self.strides, name="k4"), train=train)
        return F.self_calibration(x, k2, k3, k4, pooling=self.pooling)


class SelfCalibratedConv(nn.Module):
    """The whole operator, X to Y: `(n, h, w, c)` to `(n, h / strides, w / strides, c)`; stands in for a 3×3 convolution.

    Attributes:
        features: c, channels of input and output, even.
        strides: of K1 and K4.
        dilation: of all four convolutions.
        groups: of all four convolutions.
        pooling: r, window and step of the average pool, pixels; height and width must not be smaller.
        norm: factory of the norm that follows each convolution.
        dtype: of the computation.

    Raises:
        ValueError: if `features` is odd, the input has other than `features` channels, or is smaller than `pooling`.
    """

    features: int
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    pooling: int = 4
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q c"]:
        """Apply the operator; `train` is the norms'."""
        _check_channels(self, x.shape[-1])
        x1, x2 = F.halves(x)
        branch = {
            "features": self.features // 2,
            "strides": self.strides,
            "dilation": self.dilation,
            "groups": self.groups,
            "norm": self.norm,
            "dtype": self.dtype,
        }
        y1 = SelfCalibration(**branch, pooling=self.pooling, name="scconv")(x1, train=train)
        y2 = ConvNorm(**branch, name="k1")(x2, train=train)
        return jnp.concatenate([y1, y2], axis=-1)


def _check_channels(module: SelfCalibration | SelfCalibratedConv, channels: int) -> None:
    check_whole(pooling=module.pooling)
    if channels != module.features:
        raise ValueError(
            f"{type(module).__name__}: features={module.features} must equal the input's channels, {channels}: what it "
            "computes is added to its input. Set it so, or put a 1×1 convolution before it."
        )
