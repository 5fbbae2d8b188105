"""The blocks of plain residual networks. Each takes the operator in place of its 3×3 convolution as an argument.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385
Reference implementation: torchvision's `resnet.py`, which has the stride in the 3×3 convolution. Parameters have its names.

    y = ReLU(F(x) + shortcut(x))     F: convolutions, each followed by a norm, with ReLU between them

The factory `conv` is called as `conv(features, strides=..., dilation=..., dtype=..., name=...)`, its result as
`(x, train=...)`. `SelfCalibratedConv` and `functools.partial(ScConv, alpha=0.75)` are such factories. In a block of two 3×3
convolutions, `conv` makes the second: one replaced convolution per block fits the parameter counts of the 2023 paper.

A block is built as `block(planes=..., strides=..., dilation=..., transition=..., norm=..., dtype=..., name=...)` and called as
`(x, train=...)`. `transition` marks the first block of a stage that halves the map, or would halve it without dilation.
Its attribute `expansion` is the ratio of the output's channels to `planes`.

Differences: none.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm, ConvNorm, Dtype, Factory, conv1x1, conv3x3
from scconv_jax.shapes import Array, Float


def shortcut(
    x: Float[Array, "n h w c"],
    features: int,
    strides: int,
    *,
    norm: Factory,
    dtype: Dtype | None,
    train: bool,
    average: bool = False,
) -> Float[Array, "n p q d"]:
    """Return `x` if it has the shape of the block's output, else a 1×1 convolution of it with norm, named "downsample".

    Args:
        x: Input of the block, `(n, h, w, c)`.
        features: Channels of the output.
        strides: Strides of the block.
        norm: Factory of the norm.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        train: Passed to the norm.
        average: If True, an average pool has the strides, not the convolution ("ResNet-D"). Windows at the border average only
            pixels within the map.
    """
    if strides == 1 and x.shape[-1] == features:
        return x
    names = ("0", "1")
    if average:
        x, strides, names = F.avg_pool(x, strides, ceil_mode=True, count_include_pad=False), 1, ("1", "2")
    return ConvNorm(features, 1, strides, names=names, norm=norm, dtype=dtype, name="downsample")(x, train=train)


class Bottleneck(nn.Module):
    """Block of a 1×1, a 3×3 and a 1×1 convolution: `(n, h, w, c)` to `(n, h / strides, w / strides, expansion planes)`.

    Attributes:
        planes: Channels of the 3×3 convolution.
        strides: Strides of the 3×3 convolution.
        dilation: Dilation of the 3×3 convolution.
        transition: Ignored; see the module's docstring.
        expansion: Ratio of the output's channels to `planes`.
        conv: Factory of the 3×3 convolution or its replacement.
        pointwise: Factory of the 1×1 convolutions or their replacement.
        norm: Factory of the norms.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
    """

    planes: int
    strides: int = 1
    dilation: int = 1
    transition: bool = False
    expansion: int = 4
    conv: Factory = conv3x3
    pointwise: Factory = conv1x1
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

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
        x = shortcut(x, features, self.strides, norm=self.norm, dtype=self.dtype, train=train)
        return nn.relu(y + x)


class BasicBlock(nn.Module):
    """Block of two 3×3 convolutions: `(n, h, w, c)` to `(n, h / strides, w / strides, planes)`.

    Attributes:
        planes: Channels of both convolutions.
        strides: Strides of the first convolution.
        dilation: Dilation of both convolutions.
        transition: Ignored; see the module's docstring.
        conv: Factory of the second convolution or its replacement.
        first: Factory of the first convolution or its replacement.
        norm: Factory of the norms.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
    """

    expansion: ClassVar[int] = 1

    planes: int
    strides: int = 1
    dilation: int = 1
    transition: bool = False
    conv: Factory = conv3x3
    first: Factory = conv3x3
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block. `train` is passed to the norms."""
        norm = partial(self.norm, dtype=self.dtype)
        options = {"dilation": self.dilation, "dtype": self.dtype}
        y = self.first(self.planes, strides=self.strides, **options, name="conv1")(x, train=train)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = self.conv(self.planes, **options, name="conv2")(y, train=train)
        y = norm(name="bn2")(y, train=train)
        x = shortcut(x, self.planes, self.strides, norm=self.norm, dtype=self.dtype, train=train)
        return nn.relu(y + x)
