"""The blocks of plain residual networks. Each takes its 3×3 convolution, or a replacement, as an argument.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385
Reference implementation: torchvision's `resnet.py`, which has the stride in the 3×3 convolution. It gives the parameter names.

    y = ReLU(F(x) + shortcut(x))     F: convolutions, each followed by a norm, with ReLU between them

The factory `conv` is called as `conv(features, strides=..., dilation=..., dtype=..., name=...)`, and its result as
`(x, train=...)`. `SelfCalibratedConv` and `functools.partial(ScConv, alpha=0.75)` are such factories. In a block of two 3×3
convolutions, `conv` makes the second: one replaced convolution per block fits the parameter counts of the 2023 paper.

A block is built as `block(planes=..., strides=..., dilation=..., transition=..., norm=..., dtype=..., name=...)`, in a network
with `drop_path` also with `drop_path=...`, and called as `(x, train=...)`; `ResidualBlock` documents the arguments. Its attribute
`expansion` is the ratio of the output's channels to `planes`.

Differences: none.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.functional.rectifier import relu_of_sum
from scconv_jax.layers.base import Layer
from scconv_jax.layers.core import BatchNorm, ConvNorm, Dtype, Factory, conv1x1, conv3x3
from scconv_jax.shapes import Array, Float


class ResidualBlock(Layer):
    """Base of the blocks: their common attributes, and the shortcut.

    Attributes:
        planes: Width of the block.
        strides: Size of the input map divided by the size of the output map.
        dilation: Dilation of the 3×3 convolutions.
        transition: Whether the block starts a stage that halves the map, or that dilates instead.
        norm: Factory of the norms.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        drop_path: Probability that training leaves out the residual branch F(x) of an image. It needs `rngs={"dropout": key}`.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.
    """

    planes: int
    strides: int = 1
    dilation: int = 1
    transition: bool = False
    _: dataclasses.KW_ONLY
    norm: Factory = BatchNorm
    dtype: Dtype | None = None
    drop_path: float = 0.0

    @nn.nowrap
    def drop(self, y: Float[Array, "n p q d"], *, train: bool) -> Float[Array, "n p q d"]:
        """Return the residual branch, in training with zeros for a random part of the images."""
        return drop_path(y, self.drop_path, train=train)

    @nn.nowrap
    def shortcut(
        self, x: Float[Array, "n h w c"], features: int, *, train: bool, average: bool = False
    ) -> Float[Array, "n p q d"]:
        """Return `x` if it has the shape of the output, else `x` after a 1×1 convolution and norm, named "downsample".

        If `average`, an average pool has the strides, not the convolution ("ResNet-D"). At the border it averages only pixels
        within the map.
        """
        strides, names = self.strides, ("0", "1")
        if strides == 1 and x.shape[-1] == features:
            return x
        if average:
            x, strides, names = F.avg_pool(x, strides, ceil_mode=True, count_include_pad=False), 1, ("1", "2")
        conv = ConvNorm(features, 1, strides, names=names, norm=self.norm, dtype=self.dtype, name="downsample")
        return conv(x, train=train)

    @nn.nowrap
    def join(
        self, y: Float[Array, "n p q d"], x: Float[Array, "n h w c"], *, train: bool, average: bool = False
    ) -> Float[Array, "n p q d"]:
        """Return ReLU(y + shortcut(x)), the output of a block whose residual branch returned `y`."""
        total = self.drop(y, train=train) + self.shortcut(x, y.shape[-1], train=train, average=average)
        return relu_of_sum(total) if train else nn.relu(total)


def drop_path(y: Float[Array, "n p q d"], rate: float, *, train: bool) -> Float[Array, "n p q d"]:
    """Leave out the residual branch of each image with probability `rate`, and scale the others by 1 / (1 - rate).

    Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016; scaled in training, as timm does, not
    in evaluation. Call this within a compact method.
    """
    if not (rate and train):
        return y
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=False)(y)


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Return the probability for each block of a network, rising linearly from 0 to `last`."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


class Bottleneck(ResidualBlock, kw_only=True):
    """Block of a 1×1, a 3×3 and a 1×1 convolution: `(n, h, w, c)` to `(n, h / strides, w / strides, expansion planes)`.

    Source: He et al., CVPR 2016, Fig. 5, right.

    Attributes:
        expansion: Ratio of the output's channels to `planes`, the channels of the 3×3 convolution.
        conv: Factory of the 3×3 convolution, which has the strides, or of its replacement.
        pointwise: Factory of the 1×1 convolutions or their replacement.
    """

    expansion: int = 4
    conv: Factory = conv3x3
    pointwise: Factory = conv1x1

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block. `train` is passed to the norms."""
        features = self.expansion * self.planes
        norm = partial(self.norm, dtype=self.dtype)
        y = self.pointwise(self.planes, dtype=self.dtype, name="conv1")(x, train=train)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = self.conv(self.planes, strides=self.strides, dilation=self.dilation, dtype=self.dtype, name="conv2")(y, train=train)
        y = nn.relu(norm(name="bn2")(y, train=train))
        y = self.pointwise(features, dtype=self.dtype, name="conv3")(y, train=train)
        y = norm(name="bn3")(y, train=train)
        return self.join(y, x, train=train)


class BasicBlock(ResidualBlock, kw_only=True):
    """Block of two 3×3 convolutions: `(n, h, w, c)` to `(n, h / strides, w / strides, planes)`.

    Source: He et al., CVPR 2016, Fig. 5, left.

    Attributes:
        conv: Factory of the second convolution or its replacement.
        first: Factory of the first convolution, which has the strides, or of its replacement.
    """

    expansion: ClassVar[int] = 1

    conv: Factory = conv3x3
    first: Factory = conv3x3

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block. `train` is passed to the norms."""
        norm = partial(self.norm, dtype=self.dtype)
        options = {"dilation": self.dilation, "dtype": self.dtype}
        y = self.first(self.planes, strides=self.strides, **options, name="conv1")(x, train=train)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = self.conv(self.planes, **options, name="conv2")(y, train=train)
        y = norm(name="bn2")(y, train=train)
        return self.join(y, x, train=train)
