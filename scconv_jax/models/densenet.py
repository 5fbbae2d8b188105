"""Densely connected networks for small images: each layer sees the maps of all before it.

Paper: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017 (DenseNet-BC). Of ScConv
(Li, Wen, He, CVPR 2023) the 3×3 convolution of each layer is made. It goes from 128 channels to 32; of the ways to change
channels, the CRU's own (`widen="cru"`) fits the paper's parameter count.

Differences: none.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm, Dense, Dtype, Factory, check_images, conv1x1, conv3x3
from scconv_jax.layers.reconstruction import scconv_factory
from scconv_jax.shapes import Array, Float


class DenseLayer(nn.Module):
    """Norm, ReLU, 1×1, norm, ReLU, 3×3, added as further channels: `(n, h, w, c)` to `(n, h, w, growth + c)`.

    Attributes:
        growth: channels that the layer adds.
        conv: factory of the 3×3 convolution, or of what stands in for it.
        norm: factory of the norms.
        dtype: of the computation.
    """

    growth: int
    conv: Factory
    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w d"]:
        """Apply the layer; `train` is the norms'."""
        norm = partial(self.norm, dtype=self.dtype)
        y = conv1x1(4 * self.growth, dtype=self.dtype, name="conv1")(nn.relu(norm(name="bn1")(x, train=train)))
        y = self.conv(self.growth, dtype=self.dtype, name="conv2")(nn.relu(norm(name="bn2")(y, train=train)), train=train)
        return jnp.concatenate([y, x], axis=-1)


class DenseBlock(nn.Module):
    """Layers one after the other: `(n, h, w, c)` to `(n, h, w, c + size growth)`; attributes as of `DenseLayer`."""

    size: int
    layer: Factory

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w d"]:
        """Apply the layers in turn."""
        for i in range(self.size):
            x = self.layer(name=str(i))(x, train=train)
        return x


class Transition(nn.Module):
    """Norm, ReLU, 1×1 and an average pool: `(n, h, w, c)` to `(n, h / 2, w / 2, c / 2)`.

    Attributes:
        norm: factory of the norm.
        dtype: of the computation.
    """

    norm: Factory
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the transition; `train` is the norm's."""
        y = nn.relu(self.norm(dtype=self.dtype, name="bn")(x, train=train))
        return F.avg_pool(conv1x1(x.shape[-1] // 2, dtype=self.dtype, name="conv")(y), 2)


class DenseNet(nn.Module):
    """A densely connected network: images `(n, h, w, 3)` to logits `(n, num_classes)`.

    Attributes:
        block_sizes: number of layers of each block.
        growth: channels that each layer adds.
        conv: factory of the layers' 3×3 convolution.
        num_classes: length of the logits.
        dtype: of the computation; logits are float32 at least.
        axis_name: mapped axis over which BatchNorm takes its statistics; where not given, each device takes its own.

    Raises:
        ValueError: for images that are not float `(n, h, w, 3)`, or smaller than the network halves them.
    """

    block_sizes: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    conv: Factory = conv3x3
    num_classes: int = 10
    dtype: Dtype = jnp.float32
    axis_name: str | tuple[str, ...] | None = None

    def setup(self) -> None:
        """Name the parts: conv1, dense1, trans1 and so on, bn, linear."""
        norm = partial(BatchNorm, axis_name=self.axis_name)
        layer = partial(DenseLayer, self.growth, self.conv, norm, self.dtype)
        self.conv1 = conv3x3(2 * self.growth, dtype=self.dtype)
        for i, size in enumerate(self.block_sizes):
            setattr(self, f"dense{i + 1}", DenseBlock(size, layer))
            if i + 1 < len(self.block_sizes):
                setattr(self, f"trans{i + 1}", Transition(norm, self.dtype))
        self.bn = norm(dtype=self.dtype)
        self.linear = Dense(self.num_classes, dtype=self.dtype)

    def features(self, images: Float[Array, "n h w 3"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each block: `{"layer1": (n, h, w, 256), ...}`; the last after the last norm and ReLU."""
        last = len(self.block_sizes)
        check_images(images, smallest=2 ** (last - 1))
        x, maps = self.conv1(images), {}
        for i in range(1, last + 1):
            maps[f"layer{i}"] = x = getattr(self, f"dense{i}")(x, train=train)
            if i < last:
                x = getattr(self, f"trans{i}")(x, train=train)
        return maps | {f"layer{last}": nn.relu(self.bn(x, train=train))}

    def __call__(self, images: Float[Array, "n h w 3"], *, train: bool) -> Float[Array, "n classes"]:
        """Return the logits."""
        last = self.features(images, train=train)[f"layer{len(self.block_sizes)}"]
        return self.linear(F.global_avg_pool(last)).astype(jnp.promote_types(self.dtype, jnp.float32))


def scconv_densenet(
    *,
    alpha: float = 0.5,
    variant: str = "paper",
    num_classes: int = 10,
    dtype: Dtype = jnp.float32,
    axis_name: str | tuple[str, ...] | None = None,
) -> DenseNet:
    """Make a densely connected network of ScConv; see `ScConv` for `alpha` and `variant`, `DenseNet` for the rest."""
    conv = scconv_factory(alpha=alpha, variant=variant, widen="cru")
    return DenseNet(conv=conv, num_classes=num_classes, dtype=dtype, axis_name=axis_name)


MODELS = {
    "densenet121_small": DenseNet,
    "scconv_densenet121_small": scconv_densenet,
}
