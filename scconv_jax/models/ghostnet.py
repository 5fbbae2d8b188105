"""GhostNet, and residual networks of ghost convolutions, for comparison with the two papers' networks.

Paper: Han, Wang, Tian, Guo, Xu, Xu, "GhostNet: More Features from Cheap Operations", CVPR 2020, Table 1,
https://arxiv.org/abs/1911.11907
Reference implementation: https://github.com/huawei-noah/Efficient-AI-Backbones (ghostnet_pytorch). It gives the parameter names.

Differences: none in `ghostnet_100`. pytorchcv (https://github.com/osmr/imgclsmob) has a different network of the same name, with
its own checkpoint. Here it is `ghostnet_100_pytorchcv`; `Version` lists the differences. In the residual networks, every
convolution of the blocks except the shortcut's is a ghost convolution. It contains no norm or ReLU, because the block's own
follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm, Conv, ConvNorm, Dtype, Factory, check_images
from scconv_jax.layers.ghost import GhostConv
from scconv_jax.layers.squeeze_excitation import SqueezeExcitation
from scconv_jax.models.blocks import BasicBlock, Bottleneck
from scconv_jax.models.network import Feature, Network, Stage
from scconv_jax.models.resnet import NARROW, ResNet
from scconv_jax.models.spec import COMMON, DILATED, SMALL_IMAGES, ModelSpec
from scconv_jax.shapes import Array, Float


class Row(NamedTuple):
    """One row of the paper's Table 1."""

    kernel_size: int
    expansion: int  # channels inside the block
    features: int
    se: bool
    strides: int


class Version(NamedTuple):
    """The differences between implementations of GhostNet."""

    hidden: Callable[[int], int]  # from a block's channels to the width of the hidden layer of its squeeze-and-excitation
    gate: Callable[[jax.Array], jax.Array]  # of the squeeze-and-excitation
    shortcut_size: int | None  # kernel size of the shortcut's depthwise convolution; None: that of the block
    shortcut_relu: bool  # whether a ReLU follows the shortcut's depthwise convolution
    head_norm: bool  # whether the head's first layer has a norm instead of a bias


def _divisible(value: float, divisor: int) -> int:
    """Round to a multiple of `divisor`; round up if rounding down would lose more than a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


# Named functions, because lambdas cannot be pickled.
def _rounded_quarter(channels: int) -> int:
    return _divisible(channels / 4, 4)


def _quarter(channels: int) -> int:
    return channels // 4


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    return nn.hard_sigmoid(x)


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 1.0)


REFERENCE = Version(_rounded_quarter, _hard_sigmoid, None, False, False)
PYTORCHCV = Version(_quarter, _clip, 3, True, True)

# Grouped as in the reference implementation: a new group starts where the map is halved, and another after it.
GHOSTNET = (
    (Row(3, 16, 16, False, 1),),
    (Row(3, 48, 24, False, 2),),
    (Row(3, 72, 24, False, 1),),
    (Row(5, 72, 40, True, 2),),
    (Row(5, 120, 40, True, 1),),
    (Row(3, 240, 80, False, 2),),
    (
        Row(3, 200, 80, False, 1),
        Row(3, 184, 80, False, 1),
        Row(3, 184, 80, False, 1),
        Row(3, 480, 112, True, 1),
        Row(3, 672, 112, True, 1),
    ),
    (Row(5, 672, 160, True, 2),),
    (Row(5, 960, 160, False, 1), Row(5, 960, 160, True, 1), Row(5, 960, 160, False, 1), Row(5, 960, 160, True, 1)),
)


class GhostBottleneck(nn.Module):
    """Block of two ghost modules: `(n, h, w, c)` to `(n, h / strides, w / strides, features)`.

    A depthwise convolution is between them if the block has strides, and a squeeze-and-excitation if the row has one.

    Attributes:
        row: Kernel size, channels, strides and whether there is a squeeze-and-excitation.
        version: Implementation that the block follows.
        norm: Factory of the norms.
        dtype: Computation dtype.
    """

    row: Row
    version: Version
    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block. `train` is passed to the norms."""
        size, expansion, features, se, strides = self.row
        norm = partial(self.norm, dtype=self.dtype)
        ghost = partial(GhostConv, kernel_size=1, norm=self.norm, dtype=self.dtype)

        y = ghost(expansion, relu=True, name="ghost1")(x, train=train)
        if strides > 1:
            y = _depthwise(expansion, size, strides, dtype=self.dtype, name="conv_dw")(y)
            y = norm(name="bn_dw")(y, train=train)
        if se:
            hidden, names = self.version.hidden(expansion), ("conv_reduce", "conv_expand")
            y = SqueezeExcitation(hidden, gate=self.version.gate, names=names, dtype=self.dtype, name="se")(y)
        y = ghost(features, name="ghost2")(y, train=train)
        if strides > 1 or x.shape[-1] != features:
            size = self.version.shortcut_size or size
            relu = self.version.shortcut_relu
            x = _Shortcut(features, size, strides, relu, self.norm, self.dtype, name="shortcut")(x, train=train)
        return y + x


def _depthwise(channels: int, size: int, strides: int, **options: Any) -> Conv:
    return Conv(channels, size, strides=strides, padding=size // 2, groups=channels, **options)


class _Shortcut(nn.Module):
    """A depthwise and a 1×1 convolution, each followed by a norm, with a ReLU between them if `relu`."""

    features: int
    kernel_size: int
    strides: int
    relu: bool
    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        norm = partial(self.norm, dtype=self.dtype)
        x = _depthwise(x.shape[-1], self.kernel_size, self.strides, dtype=self.dtype, name="0")(x)
        x = norm(name="1")(x, train=train)
        x = Conv(self.features, 1, dtype=self.dtype, name="2")(nn.relu(x) if self.relu else x)
        return norm(name="3")(x, train=train)


class _Trunk(nn.Module):
    """All blocks and the last 1×1 convolution; returns the map before each halving, and the last map."""

    version: Version
    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        maps: dict[str, jax.Array] = {}
        for i, rows in enumerate(GHOSTNET):
            if rows[0].strides == 2:
                maps[f"layer{len(maps) + 1}"] = x
            blocks = (partial(GhostBottleneck, row, self.version, self.norm, self.dtype) for row in rows)
            x = Stage(tuple(blocks), name=str(i))(x, train=train)
        conv = partial(ConvNorm, GHOSTNET[-1][-1].expansion, 1, names=("conv", "bn1"), relu=True)
        last = partial(conv, norm=self.norm, dtype=self.dtype)
        x = Stage((last,), name=str(len(GHOSTNET)))(x, train=train)
        return maps | {f"layer{len(maps) + 1}": x}


class GhostNet(Network, kw_only=True):
    """GhostNet 1.0×: images `(n, h, w, in_channels)` to logits `(n, num_classes)`.

    Source: Han et al., CVPR 2020, Table 1.

    Attributes:
        version: `REFERENCE` or `PYTORCHCV`.
    """

    version: Version = REFERENCE
    head: ClassVar[str] = "classifier"

    def setup(self) -> None:
        """Create the parts: conv_stem, bn1, blocks, conv_head, bn_head, classifier."""
        norm = partial(BatchNorm, axis_name=self.axis_name)
        self.conv_stem = Conv(16, 3, strides=2, padding=1, dtype=self.dtype)
        self.bn1 = norm(dtype=self.dtype)
        self.blocks = _Trunk(self.version, norm, self.dtype)
        self.conv_head = Conv(self.num_features, 1, use_bias=not self.version.head_norm, dtype=self.dtype)
        self.bn_head = norm(dtype=self.dtype) if self.version.head_norm else None
        self.add_head()

    @nn.nowrap
    def feature_info(self) -> dict[str, Feature]:
        """Return channels and stride of each map that `features` returns."""
        halvings = [i for i, rows in enumerate(GHOSTNET) if rows[0].strides == 2]
        channels = [GHOSTNET[i - 1][-1].features for i in halvings] + [GHOSTNET[-1][-1].expansion]
        return {f"layer{i + 1}": Feature(width, 2 << i) for i, width in enumerate(channels)}

    @property
    def num_features(self) -> int:
        """Length of the vector that `pooled` returns, the input of the head."""
        return 1280

    @nn.nowrap
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of the modules of each stage; a stage begins where the map is halved."""
        starts = [0, *(i for i, rows in enumerate(GHOSTNET) if rows[0].strides == 2), len(GHOSTNET) + 1]
        layers = {f"layer{i + 1}": range(*ends) for i, ends in enumerate(itertools.pairwise(starts))}
        blocks = {name: tuple(f"blocks/{i}" for i in numbers) for name, numbers in layers.items()}
        return {"stem": ("conv_stem", "bn1"), **blocks, "head": ("conv_head", "bn_head", self.head)}

    def maps(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the last map of each size, `{"layer1": (n, h / 2, w / 2, 16), ..., "layer5": (n, h / 32, w / 32, 960)}`."""
        check_images(images, self.in_channels, smallest=self.smallest_image, stride=32)
        x = nn.relu(self.bn1(self.conv_stem(images), train=train))
        return self.blocks(x, train=train)

    def pool(self, last: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n d"]:
        """Return the input of the linear layer: the average, widened to 1280 channels."""
        x = self.conv_head(F.global_avg_pool(last)[:, None, None])
        x = x if self.bn_head is None else self.bn_head(x, train=train)
        return nn.relu(x)[:, 0, 0]


_GHOST_BOTTLENECK = partial(Bottleneck, conv=GhostConv, pointwise=partial(GhostConv, kernel_size=1))
_GHOST_BASIC = partial(BasicBlock, conv=GhostConv, first=GhostConv)

_GHOSTNET = partial(ModelSpec, options=COMMON, counterpart="ghostnet")
_RESNET = partial(ModelSpec, options=DILATED, counterpart="resnet")

SPECS = (
    _GHOSTNET("ghostnet_100", GhostNet, conventions=("timm-ghostnet",)),
    _GHOSTNET("ghostnet_100_pytorchcv", partial(GhostNet, version=PYTORCHCV), conventions=("pytorchcv-ghostnet",)),
    _RESNET("ghost_resnet50", partial(ResNet, _GHOST_BOTTLENECK, (3, 4, 6, 3))),
    _RESNET("ghost_resnet56_small", partial(ResNet, _GHOST_BASIC, (9, 9, 9), **NARROW), preparation=SMALL_IMAGES),
)
