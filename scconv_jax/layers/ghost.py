"""Ghost convolution: an ordinary convolution makes half of the channels, and a cheap depthwise one makes the rest from them.

Paper: Han, Wang, Tian, Guo, Xu, Xu, "GhostNet: More Features from Cheap Operations", CVPR 2020, Eqs. 3-4 with s = 2,
https://arxiv.org/abs/1911.11907
Reference implementation: https://github.com/huawei-noah/Efficient-AI-Backbones (ghostnet_pytorch). It gives the parameter names.

    Y' = X ∗ primary_conv    Y'' = Y' ∗ cheap_operation    Y = [Y', Y'']

Differences: none.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.functional.checks import check_odd
from scconv_jax.layers.base import Layer
from scconv_jax.layers.core import ConvNorm, Dtype, Factory
from scconv_jax.shapes import Array, Float


class GhostConv(Layer):
    """Ghost module, a replacement for a convolution: `(n, h, w, c)` to `(n, h / strides, w / strides, features)`.

    Source: Han et al., CVPR 2020, Eqs. 3-4.

    Attributes:
        features: Channels of the output. If odd, the ordinary convolution makes one more than the cheap one.
        kernel_size: Kernel size of the ordinary convolution, odd.
        strides: Strides of the ordinary convolution.
        dilation: Dilation of the ordinary convolution.
        cheap_size: Kernel size of the depthwise convolution, odd.
        norm: Factory of the norm after each convolution. If None, there is no norm.
        relu: Whether a ReLU follows each convolution (and its norm).
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.

    Raises:
        TypeError: If an option is unknown, or another than `features` and `kernel_size` is given by position.
        ValueError: If a kernel size is even, or a value is not a positive integer.
    """

    features: int
    kernel_size: int = 3
    _: dataclasses.KW_ONLY
    strides: int = 1
    dilation: int = 1
    cheap_size: int = 3
    norm: Factory | None = None
    relu: bool = False
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        super().__post_init__()
        check_odd(kernel_size=self.kernel_size, cheap_size=self.cheap_size)

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n p q d"]:
        """Apply both convolutions. `train` is needed only with a norm that uses it."""
        primary = -(-self.features // 2)
        part = partial(ConvNorm, primary, norm=self.norm, relu=self.relu, dtype=self.dtype)
        y = part(self.kernel_size, self.strides, self.dilation, name="primary_conv")(x, train=train)
        cheap = part(self.cheap_size, groups=primary, name="cheap_operation")(y, train=train)
        return jnp.concatenate([y, cheap], axis=-1)[..., : self.features]
