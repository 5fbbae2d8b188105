"""Ghost convolutions: half of the channels by an ordinary convolution, the others from those by a cheap depthwise one.

Paper: Han, Wang, Tian, Guo, Xu, Xu, "GhostNet: More Features from Cheap Operations", CVPR 2020, Eqs. 3-4, with s = 2. Reference
implementation: https://github.com/huawei-noah/Efficient-AI-Backbones (ghostnet_pytorch), whose parameter names these are.

Differences: none.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.functional.checks import check_odd, check_whole
from scconv_jax.layers.core import Conv, Dtype, Factory
from scconv_jax.shapes import Array, Float


class _Part(nn.Module):
    """A convolution that keeps the size (at stride 1), then a norm and a ReLU where asked for."""

    features: int
    kernel_size: int
    strides: int
    dilation: int
    groups: int
    norm: Factory | None
    relu: bool
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None) -> Float[Array, "n p q d"]:
        x = Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.dilation * (self.kernel_size // 2),
            dilation=self.dilation,
            groups=self.groups,
            dtype=self.dtype,
            name="0",
        )(x)
        if self.norm is not None:
            x = self.norm(dtype=self.dtype, name="1")(x, train=train)
        return nn.relu(x) if self.relu else x


class GhostConv(nn.Module):
    """A ghost module: `(n, h, w, c)` to `(n, h / strides, w / strides, features)`; stands in for a convolution.

    Attributes:
        features: channels of the output; of an odd number, the ordinary convolution makes one more than the cheap one.
        kernel_size: of the ordinary convolution, odd.
        strides: of the ordinary convolution.
        dilation: of the ordinary convolution.
        cheap_size: kernel of the depthwise convolution, odd.
        norm: factory of a norm after each of the two; where not given, there is none, as where a norm follows anyway.
        relu: whether a ReLU follows each of the two.
        dtype: of the computation.

    Raises:
        ValueError: for a kernel size that is even, or a value that is no whole number.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    dilation: int = 1
    cheap_size: int = 3
    norm: Factory | None = None
    relu: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n p q d"]:
        """Convolve; `train` is the norms', where there are any."""
        check_odd(kernel_size=self.kernel_size, cheap_size=self.cheap_size)
        check_whole(features=self.features)
        primary = -(-self.features // 2)
        ending = {"norm": self.norm, "relu": self.relu, "dtype": self.dtype}
        y = _Part(primary, self.kernel_size, self.strides, self.dilation, 1, **ending, name="primary_conv")(x, train=train)
        cheap = _Part(primary, self.cheap_size, 1, 1, primary, **ending, name="cheap_operation")(y, train=train)
        return jnp.concatenate([y, cheap], axis=-1)[..., : self.features]
