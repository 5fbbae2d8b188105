"""`ResNet`, the stem, stages and head that all residual networks share, and the plain networks.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; parameter names are torchvision's.
Tricks of the "v1d" networks: He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019.
Dilated networks: Yu, Koltun, Funkhouser, "Dilated Residual Networks", CVPR 2017.

`ResNet` depends on no operator: it accepts any block with the interface in `blocks.py`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_positive_int
from scconv_jax.layers.checks import check_positive_ints
from scconv_jax.layers.core import BatchNorm, Conv, Dtype, Factory, check_images, conv3x3
from scconv_jax.models.blocks import BasicBlock, Bottleneck, drop_path_rates
from scconv_jax.models.network import Feature, Network, Stage
from scconv_jax.models.spec import DILATED, SAME_COUNT, SMALL_IMAGES, WIDTH_UNKNOWN, ModelSpec, Row
from scconv_jax.shapes import Array, Float


class DeepStem(nn.Module):
    """Three 3×3 convolutions, the first with stride 2: `(n, h, w, 3)` to `(n, h / 2, w / 2, widths[2])`.

    Attributes:
        widths: Output channels of each convolution.
        norm: Factory of the norms between them.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
    """

    widths: tuple[int, int, int]
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the convolutions. `train` selects the statistics of the norms."""
        first, second, third = self.widths
        x = conv3x3(first, strides=2, dtype=self.dtype, name="0")(x)
        x = nn.relu(self.norm(dtype=self.dtype, name="1")(x, train=train))
        x = conv3x3(second, dtype=self.dtype, name="3")(x)
        x = nn.relu(self.norm(dtype=self.dtype, name="4")(x, train=train))
        return conv3x3(third, dtype=self.dtype, name="6")(x)


def stem(features: int, kernel_size: int, strides: int, *, norm: Factory, **options: Any) -> Conv:
    """Return the plain stem: one convolution. `ResNet` adds its norm as `bn1`."""
    del norm
    return Conv(features, kernel_size, strides=strides, padding=kernel_size // 2, **options)


class ResNet(Network):
    """A residual network of any block: images `(n, h, w, in_channels)` to logits `(n, num_classes)`.

    Source: He et al., CVPR 2016.

    Attributes:
        block: Factory of the blocks; see `blocks.py`.
        stage_sizes: Number of blocks of each stage.
        planes: Width of the blocks of each stage.
        stem: Factory of the layers before `bn1` and the stages, called as `stem(norm=..., dtype=...)(x, train=...)`.
        stem_pool: Whether a 3×3 max-pool with stride 2 follows the stem.
        stem_stride: Image size divided by the size of the first stage's map, pool included.
        smallest_map: Smallest height and width of the last map that the block accepts, in pixels.
        output_stride: Image size divided by the size of the last map. At a half or a quarter of the natural output stride, the
            last one or two stages keep their size and dilate their convolutions.
        drop_path: Probability that training leaves out the last block's residual branch, for each image alone. It falls linearly
            to 0 at the first block (stochastic depth). Training then needs `rngs={"dropout": key}`.

    Raises:
        ValueError: The output stride is not possible; for other errors see `Network`.
    """

    block: Factory
    stage_sizes: tuple[int, ...]
    planes: tuple[int, ...] = (64, 128, 256, 512)
    stem: Factory = partial(stem, 64, 7, 2)
    stem_pool: bool = True
    stem_stride: int = 4
    smallest_map: int = 1
    output_stride: int = 32
    _: dataclasses.KW_ONLY
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Check the stages and the output stride."""
        self.stage_sizes = check_positive_ints("stage_sizes", self.stage_sizes, "the number of blocks of each stage")
        stages = len(self.stage_sizes)
        self.planes = check_positive_ints("planes", self.planes, f"the width of each of the {stages} stages", stages)
        check_positive_int(stem_stride=self.stem_stride)
        natural = self.stem_stride << (len(self.stage_sizes) - 1)
        possible = [natural, natural // 2, natural // 4]
        if isinstance(self.output_stride, bool) or self.output_stride not in possible:
            raise ValueError(
                f"output_stride={self.output_stride!r} is not possible for this network. "
                f"It can be {natural}, or with dilation {natural // 2} or {natural // 4}."
            )
        super().__post_init__()

    def setup(self) -> None:
        """Create conv1, bn1, layer1, layer2, ... and fc (torchvision's names)."""
        norm = partial(BatchNorm, axis_name=self.axis_name)
        self.conv1 = self.stem(norm=norm, dtype=self.dtype)
        self.bn1 = norm(dtype=self.dtype)
        dilation, rates = 1, iter(drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        for i, (size, planes) in enumerate(zip(self.stage_sizes, self.planes, strict=True)):
            before, strides = dilation, self._stride(i) // self._stride(max(i - 1, 0))
            if i > 0 and strides == 1:
                dilation *= 2
            block = partial(self.block, planes=planes, norm=norm, dtype=self.dtype)
            first = partial(block, strides=strides, dilation=before, transition=i > 0)
            blocks = (first,) + (partial(block, dilation=dilation),) * (size - 1)
            if self.drop_path:
                blocks = tuple(partial(block, drop_path=next(rates)) for block in blocks)
            setattr(self, f"layer{i + 1}", Stage(blocks))
        self.add_head()

    def _stride(self, stage: int) -> int:
        """Return the image size divided by the size of a stage's map."""
        return min(self.stem_stride << stage, self.output_stride)

    @nn.nowrap
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of the modules of each stage."""
        layers = {name: (name,) for name in (f"layer{i + 1}" for i in range(len(self.stage_sizes)))}
        return {"stem": ("conv1", "bn1"), **layers, "head": (self.head,)}

    @property
    def smallest_image(self) -> int:
        """Smallest height and width of the images, in pixels."""
        return (self.smallest_map - 1) * self.output_stride + 1

    @nn.nowrap
    def feature_info(self) -> dict[str, Feature]:
        """Return channels and stride of each map that `features` returns.

        Raises:
            ValueError: The block has no `expansion`.
        """
        expansion = getattr(self.block(planes=self.planes[0]), "expansion", None)
        if expansion is None:
            raise ValueError(
                f"The channels of {self.block} are unknown: give the block an attribute `expansion`, its output channels divided "
                "by `planes`, or trace `features` with jax.eval_shape."
            )
        return {f"layer{i + 1}": Feature(expansion * planes, self._stride(i)) for i, planes in enumerate(self.planes)}

    def maps(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage by the stage's name: `{"layer1": (n, h / 4, w / 4, 256), ...}`."""
        check_images(images, self.in_channels, smallest=self.smallest_image, stride=self.output_stride)
        x = self.conv1(images, train=train)
        x = nn.relu(self.bn1(x, train=train))
        if self.stem_pool:
            x = F.max_pool(x, 3, 2, padding=1)
        maps = {}
        for i in range(len(self.stage_sizes)):
            name = f"layer{i + 1}"
            maps[name] = x = getattr(self, name)(x, train=train)
        return maps


# For images of about 32×32: a 3×3 stem and no pool.
SMALL = {"stem_pool": False, "stem_stride": 1, "num_classes": 10, "image_size": 32}
NARROW = {**SMALL, "planes": (16, 32, 64), "stem": partial(stem, 16, 3, 1), "output_stride": 4}
"""Arguments of `ResNet` for three stages with widths 16, 32 and 64 (He et al., CVPR 2016, section 4.2)."""
# An ImageNet network with this stem: four stages.
WIDE = {**SMALL, "stem": partial(stem, 64, 3, 1), "output_stride": 8}
# Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017: 4 groups of 64 channels in stage 1.
RESNEXT29 = {**SMALL, "planes": (256, 512, 1024), "stem": partial(stem, 64, 3, 1), "output_stride": 4}

_IMAGENET = partial(ModelSpec, options=DILATED, counterpart="resnet", conventions=("torchvision", "pytorchcv"))
_SMALL = partial(_IMAGENET, preparation=SMALL_IMAGES, conventions=("torchvision",))
_RESNEXT = partial(Bottleneck, expansion=2, conv=partial(conv3x3, groups=4))
_EXACT = ((0.5, 0.5), SAME_COUNT)

SPECS = (
    _IMAGENET(
        "resnet50",
        partial(ResNet, Bottleneck, (3, 4, 6, 3)),
        rows=(Row(2020, "ResNet-50", 25.6, 4.1, 76.4), Row(2023, "ResNet-50", 25.56, 4.09, 76.15, *_EXACT)),
    ),
    _IMAGENET(
        "resnet101",
        partial(ResNet, Bottleneck, (3, 4, 23, 3)),
        rows=(Row(2020, "ResNet-101", 44.5, 7.8, 78.0), Row(2023, "ResNet-101", 44.55, 7.83, 77.25, *_EXACT)),
    ),
    _SMALL("resnet20_small", partial(ResNet, Bottleneck, (2, 2, 2), **NARROW)),
    _SMALL(
        "resnet56_small",
        partial(ResNet, BasicBlock, (9, 9, 9), **NARROW),
        rows=(Row(2023, "ResNet-56", 0.86, 0.12684, 71.5, *_EXACT),),
    ),
    _SMALL(
        "resnet50_small",
        partial(ResNet, Bottleneck, (3, 4, 6, 3), **WIDE),
        rows=(Row(2023, "ResNet-50", 23.52, 1.30, 78.6, *_EXACT),),
    ),
    _SMALL(
        "resnext29_small",
        partial(ResNet, _RESNEXT, (3, 3, 3), **RESNEXT29),
        rows=(Row(2023, "ResNeXt-29", 28.27, 4.55, 81.54, (4.5, 7.5), WIDTH_UNKNOWN),),
    ),
)
