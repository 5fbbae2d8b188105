"""Wide residual networks for small images, with norm and ReLU before each convolution.

Paper: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016. In the ScConv network (Li, Wen, He, CVPR 2023), ScConv replaces
the second convolution of each block, which fits the paper's parameter count.

Differences: there is no dropout within blocks; neither paper uses it in its tables. By default, the second convolution of a block
has the stride (`strided="conv2"`); in the first paper the first has it (`strided="conv1"`). The ScConv paper's multiply-adds,
5.96 billion for WRN-28-10 and 3.75 with ScConv, fit the second (5.95 and 3.69 here) and not the first (5.25 and 2.99). The
weights are the same.
"""

from __future__ import annotations

import math
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

from flax import linen as nn

from scconv_jax.functional.checks import check_choice
from scconv_jax.layers.core import BatchNorm, Conv, Dtype, Factory, check_images, conv3x3
from scconv_jax.layers.reconstruction import scconv_factory
from scconv_jax.models.blocks import drop_path, drop_path_rates
from scconv_jax.models.network import Feature, SmallNetwork, Stage
from scconv_jax.models.spec import ABOVE_EQ_11, COMMON, DROP_PATH, RECONSTRUCTION, SAME_COUNT, SMALL_IMAGES, ModelSpec, Row
from scconv_jax.shapes import Array, Float


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3×3, norm, ReLU, 3×3 and a shortcut: `(n, h, w, c)` to `(n, h / strides, w / strides, features)`.

    Attributes:
        features: Output channels.
        strided: "conv1" or "conv2".
        conv: Factory of the second convolution or its replacement.
        norm: Factory of the norms.
        dtype: Computation dtype.
        strides: Stride of the convolution named by `strided`.
        drop_path: Probability that training leaves out the residual branch of an image.
    """

    features: int
    strided: Literal["conv1", "conv2"]
    conv: Factory
    norm: Factory
    dtype: Dtype
    strides: int = 1
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block. `train` selects the statistics of the norms."""
        norm = partial(self.norm, dtype=self.dtype)
        first, second = (self.strides, 1) if self.strided == "conv1" else (1, self.strides)
        y = nn.relu(norm(name="bn1")(x, train=train))
        if x.shape[-1] != self.features:  # the shortcut starts after the first norm
            x = Conv(self.features, 1, strides=self.strides, dtype=self.dtype, name="convShortcut")(y)
        y = conv3x3(self.features, strides=first, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(norm(name="bn2")(y, train=train))
        y = self.conv(self.features, strides=second, dtype=self.dtype, name="conv2")(y, train=train)
        return x + drop_path(y, self.drop_path, train=train)


class WideResNet(SmallNetwork):
    """A wide residual network: images `(n, h, w, in_channels)` to logits `(n, num_classes)`.

    Source: Zagoruyko, Komodakis, BMVC 2016.

    Attributes:
        depth: Number of layers, 6 k + 4.
        width: Factor on the channels of the plain network (16, 32, 64).
        conv: Factory of each block's second convolution.
        strided: Convolution with the stride: "conv2", as the ScConv paper counts, or "conv1".
        drop_path: See `ResNet`.

    Raises:
        ValueError: `strided` is neither; for other errors see `Network`.
    """

    depth: int = 28
    width: int = 10
    conv: Factory = conv3x3
    strided: Literal["conv1", "conv2"] = "conv2"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Check the depth and `strided`."""
        depth = self.depth
        if isinstance(depth, bool) or not isinstance(depth, Integral) or depth < 10 or depth % 6 != 4:
            number = isinstance(depth, Real) and not isinstance(depth, bool) and math.isfinite(depth)
            near = max(10, 6 * round((depth - 4) / 6) + 4) if number else 28
            raise ValueError(f"depth={depth!r} must be 6 k + 4, an integer from 10 on. Nearest valid value: {near}.")
        check_choice("strided", self.strided, ("conv1", "conv2"))
        super().__post_init__()

    def setup(self) -> None:
        """Create conv1, block1 to block3, bn1 and fc, the names of the common PyTorch code."""
        norm = partial(BatchNorm, axis_name=self.axis_name)
        block = partial(PreActivationBlock, strided=self.strided, conv=self.conv, norm=norm, dtype=self.dtype)
        size = (self.depth - 4) // 6
        rates = drop_path_rates(self.drop_path, 3 * size)
        self.conv1 = conv3x3(16, dtype=self.dtype)
        for i in range(3):
            others = partial(block, features=(16 << i) * self.width)
            first = others if i == 0 else partial(others, strides=2)
            blocks = (first,) + (others,) * (size - 1)
            if self.drop_path:
                blocks = tuple(partial(block, drop_path=rate) for block, rate in zip(blocks, rates[i * size :], strict=False))
            setattr(self, f"block{i + 1}", Stage(blocks))
        self.bn1 = norm(dtype=self.dtype)
        self.add_head()

    @nn.nowrap
    def feature_info(self) -> dict[str, Feature]:
        """Return channels and stride of each map that `features` returns."""
        return {f"layer{i + 1}": Feature((16 << i) * self.width, 1 << i) for i in range(3)}

    @nn.nowrap
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of the modules of each stage."""
        layers = {"layer1": ("block1",), "layer2": ("block2",), "layer3": ("block3", "bn1")}
        return {"stem": ("conv1",), **layers, "head": (self.head,)}

    def maps(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage, the last one after `bn1` and ReLU: `{"layer1": (n, h, w, 160), ...}`."""
        check_images(images, self.in_channels, smallest=self.smallest_image, stride=4)
        x, maps = self.conv1(images), {}
        for i in range(3):
            x = getattr(self, f"block{i + 1}")(x, train=train)
            maps[f"layer{i + 1}"] = x
        return maps | {"layer3": nn.relu(self.bn1(x, train=train))}


def scconv_wide_resnet(*, alpha: float = 0.5, variant: str = "paper", **options: Any) -> WideResNet:
    """Return a wide residual network of ScConv. `alpha` and `variant` are ScConv's, `options` attributes of `WideResNet`."""
    return WideResNet(conv=scconv_factory(alpha=alpha, variant=variant), **options)


_OPTIONS = (
    COMMON
    | DROP_PATH
    | {
        "depth": "Number of layers, 6 k + 4. 28 by default.",
        "width": "Channels divided by those of a plain network (16, 32, 64). 10 by default.",
        "strided": 'Convolution of a block with the stride: `"conv2"` (default), as the ScConv paper counts, or `"conv1"`.',
    }
)
_CIFAR100 = {"num_classes": 100}

SPECS = (
    ModelSpec(
        "wrn28_10_small",
        WideResNet,
        _OPTIONS,
        preparation=SMALL_IMAGES,
        rows=(Row(2023, "WRN-28-10", 36.55, 5.96, 79.4, (0.5, 0.5), SAME_COUNT, _CIFAR100),),
    ),
    ModelSpec(
        "scconv_wrn28_10_small",
        scconv_wide_resnet,
        _OPTIONS | RECONSTRUCTION,
        preparation=SMALL_IMAGES,
        rows=(Row(2023, "WRN-28-10, ScConv", 21.12, 3.75, 80.83, (0.5, 2.0), ABOVE_EQ_11, _CIFAR100),),
    ),
)
