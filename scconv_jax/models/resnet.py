"""The trunk that the residual networks share: stem, stages of blocks, head; and the plain networks by name.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; parameter names are torchvision's.
Tricks of the "v1d" networks: He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019.
Dilated networks: Yu, Koltun, Funkhouser, "Dilated Residual Networks", CVPR 2017.

The trunk knows no operator by name: it takes a block, any factory that can be called as `blocks.py` says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm, Conv, Dense, Dtype, Factory, check_images, conv3x3
from scconv_jax.models.blocks import BasicBlock, Bottleneck
from scconv_jax.shapes import Array, Float


class DeepStem(nn.Module):
    """Three 3×3 convolutions in place of one 7×7, the first of stride 2: `(n, h, w, 3)` to `(n, h / 2, w / 2, widths[2])`.

    Attributes:
        widths: channels after each convolution.
        norm: factory of the norms between them.
        dtype: of the computation.
    """

    widths: tuple[int, int, int]
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 3"], *, train: bool) -> Float[Array, "n p q d"]:
        """Convolve three times; `train` is the norms'."""
        first, second, third = self.widths
        x = conv3x3(first, strides=2, dtype=self.dtype, name="0")(x)
        x = nn.relu(self.norm(dtype=self.dtype, name="1")(x, train=train))
        x = conv3x3(second, dtype=self.dtype, name="3")(x)
        x = nn.relu(self.norm(dtype=self.dtype, name="4")(x, train=train))
        return conv3x3(third, dtype=self.dtype, name="6")(x)


def stem(features: int, kernel_size: int, strides: int, *, norm: Factory, **options: Any) -> Conv:
    """Make the plain stem: one convolution, whose norm the trunk adds as `bn1`."""
    del norm
    return Conv(features, kernel_size, strides=strides, padding=kernel_size // 2, **options)


class Stage(nn.Module):
    """Blocks of one width; the first changes the size and the channels.

    Attributes:
        block: factory of the blocks.
        size: number of blocks.
        planes: width of the blocks.
        strides: of the first block.
        dilation: of the first block, and of the others.
        transition: whether the stage halves the map, or would, were the network not dilated.
        norm: factory of the norms.
        dtype: of the computation.
    """

    block: Factory
    size: int
    planes: int
    strides: int
    dilation: tuple[int, int]
    transition: bool
    norm: Factory
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the blocks in turn."""
        block = partial(self.block, planes=self.planes, norm=self.norm, dtype=self.dtype)
        first, others = self.dilation
        x = block(strides=self.strides, dilation=first, transition=self.transition, name="0")(x, train=train)
        for i in range(1, self.size):
            x = block(dilation=others, name=str(i))(x, train=train)
        return x


class ResNet(nn.Module):
    """A residual network of any block: images `(n, h, w, 3)` to logits `(n, num_classes)`.

    Attributes:
        block: factory of the blocks; see `blocks.py`.
        stage_sizes: number of blocks of each stage.
        planes: width of the blocks of each stage.
        stem: factory of what comes before `bn1` and the stages, called `stem(norm=..., dtype=...)(x, train=...)`.
        stem_pool: whether a max-pool 3×3 of stride 2 follows the stem.
        stem_stride: size of the images over size of the first stage's map, pool included.
        smallest_map: least height and width of the last map that the block can take, pixels.
        num_classes: length of the logits.
        output_stride: size of the images over size of the last map. Smaller than by nature, the last stages keep their size
            and dilate their convolutions instead.
        dtype: of the computation; logits are float32 all the same (float64 for a float64 model), and so are parameters.
        axis_name: mapped axis over which BatchNorm takes its statistics; where not given, each device takes its own.

    Raises:
        ValueError: for an output stride that cannot be had, and for images that are not float `(n, h, w, 3)` or too small.
    """

    block: Factory
    stage_sizes: tuple[int, ...]
    planes: tuple[int, ...] = (64, 128, 256, 512)
    stem: Factory = partial(stem, 64, 7, 2)
    stem_pool: bool = True
    stem_stride: int = 4
    smallest_map: int = 1
    num_classes: int = 1000
    output_stride: int = 32
    dtype: Dtype = jnp.float32
    axis_name: str | tuple[str, ...] | None = None

    def setup(self) -> None:
        """Name the parts as torchvision does: conv1, bn1, layer1 and so on, fc."""
        total = self.stem_stride * 2 ** (len(self.stage_sizes) - 1)
        if self.output_stride not in (total, total // 2, total // 4):
            raise ValueError(
                f"output_stride={self.output_stride} cannot be had from this network; "
                f"it has {total}, or dilated {total // 2} or {total // 4}."
            )
        norm = partial(BatchNorm, axis_name=self.axis_name)
        self.conv1 = self.stem(norm=norm, dtype=self.dtype)
        self.bn1 = norm(dtype=self.dtype)
        stride, dilation = self.stem_stride, 1
        for i, (size, planes) in enumerate(zip(self.stage_sizes, self.planes, strict=True)):
            before, strides = dilation, 1
            if i > 0 and stride < self.output_stride:
                strides, stride = 2, 2 * stride
            elif i > 0:
                dilation *= 2
            stage = Stage(
                self.block,
                size,
                planes,
                strides=strides,
                dilation=(before, dilation),
                transition=i > 0,
                norm=norm,
                dtype=self.dtype,
            )
            setattr(self, f"layer{i + 1}", stage)
        self.fc = Dense(self.num_classes, dtype=self.dtype)

    def features(self, images: Float[Array, "n h w 3"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage, by the stage's name: `{"layer1": (n, h / 4, w / 4, 256), ...}`."""
        check_images(images, smallest=(self.smallest_map - 1) * self.output_stride + 1)
        x = self.conv1(images, train=train)
        x = nn.relu(self.bn1(x, train=train))
        if self.stem_pool:
            x = F.max_pool(x, 3, 2, padding=1)
        maps = {}
        for i in range(len(self.stage_sizes)):
            name = f"layer{i + 1}"
            maps[name] = x = getattr(self, name)(x, train=train)
        return maps

    def __call__(self, images: Float[Array, "n h w 3"], *, train: bool) -> Float[Array, "n classes"]:
        """Return the logits; in training, normalise by the batch's statistics (`mutable=["batch_stats"]`)."""
        last = self.features(images, train=train)[f"layer{len(self.stage_sizes)}"]
        logits = self.fc(F.global_avg_pool(last))
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


# For images of 32×32 or so: a 3×3 stem and no pool.
SMALL = {"stem_pool": False, "stem_stride": 1, "num_classes": 10}
# He et al. 2016, section 4.2: three stages, 16, 32 and 64 wide.
NARROW = {**SMALL, "planes": (16, 32, 64), "stem": partial(stem, 16, 3, 1), "output_stride": 4}
# An ImageNet network with the stem changed: four stages.
WIDE = {**SMALL, "stem": partial(stem, 64, 3, 1), "output_stride": 8}
# Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017; 4 groups, 64 channels each at first.
RESNEXT29 = {**SMALL, "planes": (256, 512, 1024), "stem": partial(stem, 64, 3, 1), "output_stride": 4}

MODELS = {
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet20_small": partial(ResNet, Bottleneck, (2, 2, 2), **NARROW),
    "resnet56_small": partial(ResNet, BasicBlock, (9, 9, 9), **NARROW),
    "resnet50_small": partial(ResNet, Bottleneck, (3, 4, 6, 3), **WIDE),
    "resnext29_small": partial(ResNet, partial(Bottleneck, expansion=2, conv=partial(conv3x3, groups=4)), (3, 3, 3), **RESNEXT29),
}
