"""Densely connected networks for small images: the input of each layer is the concatenation of all maps before it.

Paper: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017 (DenseNet-BC). In the ScConv
network (Li, Wen, He, CVPR 2023), ScConv replaces the 3×3 convolution of each layer, from 128 channels to 32. The CRU changes the
channels (`widen="cru"`), which fits the paper's parameter count.

Differences: none.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.checks import check_positive_ints
from scconv_jax.layers.core import BatchNorm, Dtype, Factory, check_images, conv1x1, conv3x3
from scconv_jax.layers.reconstruction import scconv_factory
from scconv_jax.models.network import Feature, SmallNetwork, Stage
from scconv_jax.models.spec import COMMON, RECONSTRUCTION, SAME_COUNT, SMALL_IMAGES, ModelSpec, Row
from scconv_jax.shapes import Array, Float


class DenseLayer(nn.Module):
    """Norm, ReLU, 1×1, norm, ReLU, 3×3, concatenated with the input: `(n, h, w, c)` to `(n, h, w, growth + c)`.

    Attributes:
        growth: Channels that the layer adds.
        conv: Factory of the 3×3 convolution or its replacement.
        norm: Factory of the norms.
        dtype: Computation dtype.
    """

    growth: int
    conv: Factory
    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w d"]:
        """Apply the layer. `train` selects the statistics of the norms."""
        norm = partial(self.norm, dtype=self.dtype)
        y = conv1x1(4 * self.growth, dtype=self.dtype, name="conv1")(nn.relu(norm(name="bn1")(x, train=train)))
        y = self.conv(self.growth, dtype=self.dtype, name="conv2")(nn.relu(norm(name="bn2")(y, train=train)), train=train)
        return jnp.concatenate([y, x], axis=-1)


class Transition(nn.Module):
    """Norm, ReLU, 1×1 and an average pool: `(n, h, w, c)` to `(n, h / 2, w / 2, c / 2)`.

    Attributes:
        norm: Factory of the norm.
        dtype: Computation dtype.
    """

    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the transition. `train` selects the statistics of the norm."""
        y = nn.relu(self.norm(dtype=self.dtype, name="bn")(x, train=train))
        return F.avg_pool(conv1x1(x.shape[-1] // 2, dtype=self.dtype, name="conv")(y), 2)


class DenseNet(SmallNetwork):
    """A densely connected network: images `(n, h, w, in_channels)` to logits `(n, num_classes)`.

    Source: Huang et al., CVPR 2017.

    Attributes:
        block_sizes: Number of layers of each block.
        growth: Channels that each layer adds.
        conv: Factory of the layers' 3×3 convolution.
    """

    block_sizes: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    conv: Factory = conv3x3
    head: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        """Check the sizes of the blocks."""
        self.block_sizes = check_positive_ints("block_sizes", self.block_sizes, "the number of layers of each block")
        super().__post_init__()

    def setup(self) -> None:
        """Create conv1, dense1, trans1, dense2, ..., bn and linear."""
        norm = partial(BatchNorm, axis_name=self.axis_name)
        layer = partial(DenseLayer, self.growth, self.conv, norm, self.dtype)
        self.conv1 = conv3x3(2 * self.growth, dtype=self.dtype)
        for i, size in enumerate(self.block_sizes):
            setattr(self, f"dense{i + 1}", Stage((layer,) * size))
            if i + 1 < len(self.block_sizes):
                setattr(self, f"trans{i + 1}", Transition(norm, self.dtype))
        self.bn = norm(dtype=self.dtype)
        self.add_head()

    @property
    def smallest_image(self) -> int:
        """Smallest height and width of the images, in pixels."""
        return 1 << (len(self.block_sizes) - 1)

    @nn.nowrap
    def feature_info(self) -> dict[str, Feature]:
        """Return channels and stride of each map that `features` returns."""
        maps, channels = {}, 2 * self.growth
        for i, size in enumerate(self.block_sizes):
            channels += size * self.growth
            maps[f"layer{i + 1}"] = Feature(channels, 1 << i)
            channels //= 2
        return maps

    @nn.nowrap
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of the modules of each stage; a transition belongs to the stage before it."""
        last = len(self.block_sizes)
        layers = {f"layer{i}": (f"dense{i}", f"trans{i}" if i < last else "bn") for i in range(1, last + 1)}
        return {"stem": ("conv1",), **layers, "head": (self.head,)}

    def maps(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each block, the last one after `bn` and ReLU: `{"layer1": (n, h, w, 256), ...}`."""
        last = len(self.block_sizes)
        check_images(images, self.in_channels, smallest=self.smallest_image, stride=1 << (last - 1))
        x, maps = self.conv1(images), {}
        for i in range(1, last + 1):
            maps[f"layer{i}"] = x = getattr(self, f"dense{i}")(x, train=train)
            if i < last:
                x = getattr(self, f"trans{i}")(x, train=train)
        return maps | {f"layer{last}": nn.relu(self.bn(x, train=train))}


def scconv_densenet(*, alpha: float = 0.5, variant: str = "paper", **options: Any) -> DenseNet:
    """Return a densely connected network of ScConv. `alpha` and `variant` are ScConv's, `options` attributes of `DenseNet`."""
    return DenseNet(conv=scconv_factory(alpha=alpha, variant=variant, widen="cru"), **options)


_SMALL = partial(ModelSpec, preparation=SMALL_IMAGES)
_CIFAR100 = {"num_classes": 100}

_OPTIONS = COMMON | {
    "block_sizes": "Number of layers of each block, a tuple. (6, 12, 24, 16) by default.",
    "growth": "Channels that each layer adds. 32 by default.",
}

SPECS = (
    _SMALL(
        "densenet121_small",
        DenseNet,
        _OPTIONS,
        rows=(Row(2023, "DenseNet-121", 7.05, 0.898, 79.43, (0.5, 1.0), SAME_COUNT, _CIFAR100),),
    ),
    _SMALL(
        "scconv_densenet121_small",
        scconv_densenet,
        _OPTIONS | RECONSTRUCTION,
        rows=(Row(2023, "DenseNet-121, ScConv", 5.45, 0.594, 80.24, (1.0, 1.0), SAME_COUNT, _CIFAR100),),
    ),
)
