"""Wide residual networks for small images: norm and ReLU come before each convolution.

Paper: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016. Of ScConv (Li, Wen, He, CVPR 2023) one of a block's two
convolutions is made, the second: then the parameter count fits the paper's.

Differences: dropout, which neither paper's tables use, is left out; and where a block strides. Wide ResNets do so in the first
convolution. The ScConv paper's multiply-adds, 5.96 billion for WRN-28-10 and 3.75 for its twin, are those of networks that stride
in the second (5.95 and 3.69 here; in the first, 5.25 and 2.99), so that the networks by name do too; the weights are the same.
`WideResNet(strided="conv1")` is the first paper's.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_choice
from scconv_jax.layers.core import BatchNorm, Conv, Dense, Dtype, Factory, check_images, conv3x3
from scconv_jax.layers.reconstruction import scconv_factory
from scconv_jax.shapes import Array, Float


class PreActivationBlock(nn.Module):
    """Norm, ReLU, 3×3, norm, ReLU, 3×3, and a shortcut: `(n, h, w, c)` to `(n, h / strides, w / strides, features)`.

    Attributes:
        features: channels of the output.
        strides: of the convolution that `strided` names.
        strided: "conv1" or "conv2".
        conv: factory of the second convolution, or of what stands in for it.
        norm: factory of the norms.
        dtype: of the computation.
    """

    features: int
    strides: int
    strided: Literal["conv1", "conv2"]
    conv: Factory
    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block; `train` is the norms'."""
        norm = partial(self.norm, dtype=self.dtype)
        first, second = (self.strides, 1) if self.strided == "conv1" else (1, self.strides)
        y = nn.relu(norm(name="bn1")(x, train=train))
        if x.shape[-1] != self.features:  # the shortcut starts after the first norm
            x = Conv(self.features, 1, strides=self.strides, dtype=self.dtype, name="convShortcut")(y)
        y = conv3x3(self.features, strides=first, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(norm(name="bn2")(y, train=train))
        return x + self.conv(self.features, strides=second, dtype=self.dtype, name="conv2")(y, train=train)


class WideResNet(nn.Module):
    """A wide residual network: images `(n, h, w, 3)` to logits `(n, num_classes)`.

    Attributes:
        depth: number of layers, 6 k + 4.
        width: channels over those of a plain network (16, 32, 64).
        conv: factory of each block's second convolution.
        strided: the convolution of a block that strides, "conv2" as the ScConv paper counts, or "conv1".
        num_classes: length of the logits.
        dtype: of the computation; logits are float32 at least.
        axis_name: mapped axis over which BatchNorm takes its statistics; where not given, each device takes its own.

    Raises:
        ValueError: for images that are not float `(n, h, w, 3)`, or a `strided` that is neither.
    """

    depth: int = 28
    width: int = 10
    conv: Factory = conv3x3
    strided: Literal["conv1", "conv2"] = "conv2"
    num_classes: int = 10
    dtype: Dtype = jnp.float32
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without an input."""
        check_choice("strided", self.strided, ("conv1", "conv2"))
        super().__post_init__()

    def setup(self) -> None:
        """Name the parts as the common PyTorch code does: conv1, block1 and so on, bn1, fc."""
        norm = partial(BatchNorm, axis_name=self.axis_name)
        block = partial(PreActivationBlock, strided=self.strided, conv=self.conv, norm=norm, dtype=self.dtype)
        size = (self.depth - 4) // 6
        self.conv1 = conv3x3(16, dtype=self.dtype)
        for i in range(3):
            setattr(self, f"block{i + 1}", _Stage(block, size, features=(16 << i) * self.width, strides=1 if i == 0 else 2))
        self.bn1 = norm(dtype=self.dtype)
        self.fc = Dense(self.num_classes, dtype=self.dtype)

    def features(self, images: Float[Array, "n h w 3"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage: `{"layer1": (n, h, w, 160), ...}`; the last after the last norm and ReLU."""
        check_images(images, smallest=1)
        x, maps = self.conv1(images), {}
        for i in range(3):
            x = getattr(self, f"block{i + 1}")(x, train=train)
            maps[f"layer{i + 1}"] = x
        return maps | {"layer3": nn.relu(self.bn1(x, train=train))}

    def __call__(self, images: Float[Array, "n h w 3"], *, train: bool) -> Float[Array, "n classes"]:
        """Return the logits."""
        logits = self.fc(F.global_avg_pool(self.features(images, train=train)["layer3"]))
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


class _Stage(nn.Module):
    block: Factory
    size: int
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        for i in range(self.size):
            strides = self.strides if i == 0 else 1
            x = self.block(features=self.features, strides=strides, name=str(i))(x, train=train)
        return x


def scconv_wide_resnet(
    *,
    alpha: float = 0.5,
    variant: str = "paper",
    strided: Literal["conv1", "conv2"] = "conv2",
    num_classes: int = 10,
    dtype: Dtype = jnp.float32,
    axis_name: str | tuple[str, ...] | None = None,
) -> WideResNet:
    """Make a wide residual network of ScConv; see `ScConv` for `alpha` and `variant`, `WideResNet` for the rest."""
    conv = scconv_factory(alpha=alpha, variant=variant)
    return WideResNet(conv=conv, strided=strided, num_classes=num_classes, dtype=dtype, axis_name=axis_name)


MODELS = {
    "wrn28_10_small": WideResNet,
    "scconv_wrn28_10_small": scconv_wide_resnet,
}
