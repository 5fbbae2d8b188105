"""Self-calibrated convolution (SC-Conv) as in SCNet: K1 to K4 are 3×3 convolutions without bias, each with a batch norm.

Paper: Liu, Hou, Cheng, Wang, Feng, "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020,
pp. 10096-10105. Reference implementation: https://github.com/MCG-NKU/SCNet

The equations are in `scconv_jax/functional/self_calibration.py`. As in the reference implementation, K1 and K4 have the strides,
and all four convolutions have the dilation and the groups.

Differences: none. The reference implementation's class `SCConv` is `SelfCalibration` here. Its networks define K1 outside that
class and concatenate in the other order (see `scconv_jax/models/scnet.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_divides, check_even
from scconv_jax.layers.base import Layer
from scconv_jax.layers.core import BatchNorm, ConvNorm, Dtype, Factory
from scconv_jax.shapes import Array, Float

_ADVICE = {"kernel_size": "K1 to K4 are 3×3 convolutions: leave kernel_size out."}


class SelfCalibration(Layer):
    """The calibrated branch of SC-Conv, X1 to Y1: `(n, h, w, c)` to `(n, h / strides, w / strides, c)`.

    Source: Liu et al., CVPR 2020, Eqs. 3-6.

    Attributes:
        features: c, channels of input and output.
        strides: Strides of K4.
        dilation: Dilation of K2, K3 and K4.
        groups: Groups of K2, K3 and K4.
        pooling: r, window and step of the average pool, in pixels. The map must not be smaller.
        norm: Factory of the norm after each convolution. If None, there are no norms.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.

    Raises:
        TypeError: If an option is unknown, or another than `features` is given by position.
        ValueError: If a value is out of range, `groups` does not divide `features`, or the input does not have `features`
            channels or is smaller than `pooling`.
    """

    advice: ClassVar[Mapping[str, str]] = _ADVICE

    features: int
    _: dataclasses.KW_ONLY
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    pooling: int = 4
    norm: Factory | None = BatchNorm
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        super().__post_init__()
        _check_groups(self, self.features)

    def setup(self) -> None:
        """Create K2, K3 and K4."""
        k = partial(ConvNorm, self.features, dilation=self.dilation, groups=self.groups, norm=self.norm, dtype=self.dtype)
        self.k2 = k(names=("1", "2"))  # "0" is the pool in the reference implementation's Sequential
        self.k3 = k()
        self.k4 = k(strides=self.strides)

    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q c"]:
        """Apply the branch. `train` is passed to the norms."""
        _check_channels(self, x.shape[-1])
        branches = (partial(k, train=train) for k in (self.k2, self.k3, self.k4))
        return F.self_calibration(x, *branches, pooling=self.pooling)


class SelfCalibratedConv(Layer):
    """SC-Conv of 2020, a replacement for a 3×3 convolution: `(n, h, w, c)` to `(n, h / strides, w / strides, c)`.

    Source: Liu et al., CVPR 2020, Fig. 2.

    Attributes:
        features: c, channels of input and output, even.
        strides: Strides of K1 and K4.
        dilation: Dilation of all four convolutions.
        groups: Groups of all four convolutions.
        pooling: r, window and step of the average pool, in pixels. The map must not be smaller.
        norm: Factory of the norm after each convolution. If None, there are no norms.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.

    Raises:
        TypeError: If an option is unknown, or another than `features` is given by position.
        ValueError: If a value is out of range, `features` is odd, `groups` does not divide its half, or the input does not have
            `features` channels or is smaller than `pooling`.
    """

    advice: ClassVar[Mapping[str, str]] = _ADVICE

    features: int
    _: dataclasses.KW_ONLY
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    pooling: int = 4
    norm: Factory | None = BatchNorm
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        super().__post_init__()
        check_even(self.features)
        _check_groups(self, self.features // 2)

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q c"]:
        """Apply the operator. `train` is passed to the norms."""
        _check_channels(self, x.shape[-1])
        options = {
            "features": self.features // 2,
            "strides": self.strides,
            "dilation": self.dilation,
            "groups": self.groups,
            "norm": self.norm,
            "dtype": self.dtype,
        }
        k1, scconv = ConvNorm(**options, name="k1"), SelfCalibration(**options, name="scconv")
        branches = (partial(k, train=train) for k in (k1, scconv.k2, scconv.k3, scconv.k4))
        return F.self_calibrated_conv(x, *branches, pooling=self.pooling)


def _check_groups(module: SelfCalibration | SelfCalibratedConv, channels: int) -> None:
    """Check the groups of each convolution, which has as many input as output `channels`."""
    check_divides("groups", module.groups, "the channels of input and output", channels, channels)


def _check_channels(module: SelfCalibration | SelfCalibratedConv, channels: int) -> None:
    if channels != module.features:
        raise ValueError(
            f"{type(module).__name__}: features={module.features} must equal the input's channels, {channels}, because the "
            "calibration adds its output to its input. Change `features`, or put a 1×1 convolution before the layer."
        )
