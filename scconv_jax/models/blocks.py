"""The blocks of plain residual networks, with room for another operator where their 3×3 convolution stands.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, with the stride in the 3×3 convolution, as in
torchvision, whose parameter names these are.

`conv` is called `conv(features, strides=..., dilation=..., dtype=..., name=...)(x, train=...)`: hand it `SelfCalibratedConv` or
`functools.partial(ScConv, alpha=0.75)` to make another network. In a block of two 3×3 convolutions it is the second, which keeps
size and channels: where one per block was replaced, the 2023 paper's parameter counts fit.

A block itself is called `block(planes=..., strides=..., dilation=..., transition=..., norm=..., dtype=..., name=...)`, then as
`(x, train=...)`; `transition` says that it begins a stage that halves the map, or would, were the network not dilated.
"""

from __future__ import annotations

from functools import partial

from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm, Conv, Dtype, Factory, conv1x1, conv3x3
from scconv_jax.shapes import Array, Float


class Shortcut(nn.Module):
    """The identity where shapes allow it, else a 1×1 convolution and a norm: `(n, h, w, c)` to `(n, p, q, features)`.

    Attributes:
        features: channels of the output.
        strides: of the convolution, or of the average pool before it.
        average: pool by averaging, then convolve without strides ("ResNet-D"); windows at the border average the pixels
            they have.
        norm: factory of the norm.
        dtype: of the computation.
    """

    features: int
    strides: int = 1
    average: bool = False
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Bring `x` to the shape of the block's output."""
        strides, first = self.strides, 0
        if self.average:
            x = F.avg_pool(x, strides, ceil_mode=True, count_include_pad=False)
            strides, first = 1, 1
        x = Conv(self.features, 1, strides=strides, dtype=self.dtype, name=str(first))(x)
        return self.norm(dtype=self.dtype, name=str(first + 1))(x, train=train)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut: `(n, h, w, c)` to `(n, h / strides, w / strides, expansion planes)`.

    Attributes:
        planes: channels of the 3×3 convolution.
        strides: of the 3×3 convolution.
        dilation: of the 3×3 convolution.
        transition: unused here; see the module's docstring.
        expansion: channels of the output over `planes`.
        conv: factory of the 3×3 convolution, or of what stands in for it.
        pointwise: factory of the 1×1 convolutions, or of what stands in for them.
        norm: factory of the norms.
        dtype: of the computation.
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
        """Apply the block; `train` is the norms'."""
        features = self.expansion * self.planes
        norm = partial(self.norm, dtype=self.dtype)
        y = self.pointwise(self.planes, dtype=self.dtype, name="conv1")(x, train=train)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = self.conv(self.planes, strides=self.strides, dilation=self.dilation, dtype=self.dtype, name="conv2")(y, train=train)
        y = nn.relu(norm(name="bn2")(y, train=train))
        y = self.pointwise(features, dtype=self.dtype, name="conv3")(y, train=train)
        y = norm(name="bn3")(y, train=train)
        if self.strides != 1 or x.shape[-1] != features:
            x = Shortcut(features, self.strides, norm=self.norm, dtype=self.dtype, name="downsample")(x, train=train)
        return nn.relu(y + x)


class BasicBlock(nn.Module):
    """Two 3×3 and a shortcut: `(n, h, w, c)` to `(n, h / strides, w / strides, planes)`.

    Attributes:
        planes: channels of both convolutions.
        strides: of the first convolution.
        dilation: of both convolutions.
        transition: unused here; see the module's docstring.
        conv: factory of the second convolution, or of what stands in for it.
        first: factory of the first convolution, or of what stands in for it.
        norm: factory of the norms.
        dtype: of the computation.
    """

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
        """Apply the block; `train` is the norms'."""
        norm = partial(self.norm, dtype=self.dtype)
        options = {"dilation": self.dilation, "dtype": self.dtype}
        y = self.first(self.planes, strides=self.strides, **options, name="conv1")(x, train=train)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = self.conv(self.planes, **options, name="conv2")(y, train=train)
        y = norm(name="bn2")(y, train=train)
        if self.strides != 1 or x.shape[-1] != self.planes:
            x = Shortcut(self.planes, self.strides, norm=self.norm, dtype=self.dtype, name="downsample")(x, train=train)
        return nn.relu(y + x)
