"""`Network`, the base of all networks, and `Stage`, a sequence of blocks."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import Dtype, Factory
from scconv_jax.shapes import Array, Float


class Feature(NamedTuple):
    """The map after one stage of a network."""

    channels: int
    stride: int  # image size divided by the size of the map


class Stage(nn.Module):
    """Layers applied in turn, named "0", "1", ... as in PyTorch's `Sequential`."""

    layers: tuple[Factory, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the layers. `train` is passed to each."""
        for i, layer in enumerate(self.layers):
            x = layer(name=str(i))(x, train=train)
        return x


class Network(nn.Module, kw_only=True):
    """Base class: images `(n, h, w, in_channels)` to logits `(n, num_classes)`.

    Subclasses define `features`, `feature_info` and the head.

    Attributes:
        num_classes: Length of the logits.
        in_channels: Channels of the images: 3 for RGB, 1 for grey ones.
        dtype: Computation dtype. Logits are float32, or float64 for a float64 network; parameters are float32.
        axis_name: Mapped axis over which BatchNorm computes its statistics. If None, each device computes its own.
        image_size: Height and width, in pixels, of the images that the network is designed for.
        head: Name of the linear layer.

    Raises:
        ValueError: The images are not float `(n, h, w, in_channels)`, or smaller than `smallest_image`.
    """

    num_classes: int = 1000
    in_channels: int = 3
    dtype: Dtype = jnp.float32
    axis_name: str | tuple[str, ...] | None = None
    image_size: int = 224
    head: ClassVar[str] = "fc"

    @property
    def smallest_image(self) -> int:
        """Smallest height and width of the images, in pixels."""
        return 1

    @nn.nowrap
    def feature_info(self) -> dict[str, Feature]:
        """Return channels and stride of each map that `features` returns."""
        raise NotImplementedError

    def features(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage by name: `{"layer1": (n, h / 4, w / 4, 256), ...}`."""
        raise NotImplementedError

    def pool(self, last: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n d"]:
        """Return the input of the linear layer, given the last map: its average."""
        del train
        return F.global_avg_pool(last)

    def __call__(self, images: Float[Array, "n h w i"], *, train: bool) -> Float[Array, "n classes"]:
        """Return the logits. `train=True` normalises by the batch's statistics and needs `mutable=["batch_stats"]`."""
        *_, last = self.features(images, train=train).values()
        logits = getattr(self, self.head)(self.pool(last, train=train))
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


class SmallNetwork(Network, kw_only=True):
    """A network with defaults for small images."""

    num_classes: int = 10
    image_size: int = 32
