"""`ModelSpec`, the only record of a network. All tables and help texts are made from it.

Each model file ends with its records; `registry.py` merges them into one table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from scconv_jax.images import Preparation, resize_for
from scconv_jax.models.complexity import Part, summarise, total
from scconv_jax.models.network import Feature, Network

# Options of `create_model`, each with its meaning.
COMMON = {
    "num_classes": "Number of classes: the length of the logits. 1000 by default, 10 for the small networks. 0: no head.",
    "in_channels": "Channels of the images: 3 by default, 1 for grey ones, 4 or more for others.",
    "dtype": "Computation dtype: `jnp.float32` (default), `jnp.bfloat16`, `jnp.float16` or, with 64-bit JAX, `jnp.float64`.",
    "axis_name": "Mapped axis over which BatchNorm computes statistics. None (default): each device computes its own.",
    "dropout": "Probability that training sets a pooled feature to zero, before the head. 0 by default.",
    "frozen": 'Stages, `("stem", "layer1")`, or patterns of module paths. Training runs their norms by the running statistics.',
    "rematerialise": "Recompute blocks in the backward pass instead of storing their activations. False by default.",
    "param_dtype": "Dtype of the parameters. None (default): `jnp.float32`.",
    "kernel_init": "Initialiser of all kernels, `(key, shape, dtype)` to an array. None (default): PyTorch's initial values.",
}
DROP_PATH = {
    "drop_path": "Stochastic depth: probability of leaving out the last block in training, falling to 0 at the first.",
}
DILATED = {
    **COMMON,
    **DROP_PATH,
    "planes": "Width of the blocks in each stage, a tuple.",
    "output_stride": "Image size divided by the size of the last map. Half or a quarter of the default dilates the last stages.",
}
RECONSTRUCTION = {
    "alpha": "ScConv's α, between 0 and 1: share of the channels in the branch with the k×k convolution. 0.5 by default.",
    "variant": 'Version of ScConv: `"paper"` (default), `"2023-07"`, `"2023-09"` or `"2023-10"`.',
}

IMAGENET = Preparation(size=224, resize=resize_for(224))
SMALL_IMAGES = Preparation(size=32, resize=resize_for(32))

# Why our counts differ from a paper's.
ROUNDED = "printed with one decimal"
SAME_COUNT = "the same count"
ABOVE_EQ_11 = "the paper's figure is above its own Eq. 11"
WIDTH_UNKNOWN = "groups and width not given; 4×64d is nearest"


class Row(NamedTuple):
    """One row of a paper's table. 2020: Liu et al., CVPR, and the README of MCG-NKU/SCNet. 2023: Li et al., CVPR."""

    paper: int  # year
    label: str  # the paper's name of the network
    parameters: float  # millions
    multiply_adds: float  # billions
    top1: float  # percent, on ImageNet, or on CIFAR-100 for small images
    margins: tuple[float, float] = (0.5, 2.0)  # largest differences of our parameters and multiply-adds, percent
    reason: str = ROUNDED  # for the margins
    options: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False, repr=False)
class ModelSpec:
    """The record of one network. Printing it shows all fields.

    Attributes:
        name: Name for `create_model`.
        build: Function from any of `options` to the network.
        options: Meaning of each option of `create_model`.
        preparation: Preparation of images.
        conventions: Key conventions of its checkpoints, the most common first. Empty if no other project's are supported.
        counterpart: PyTorch network for `verify` to compare with: "resnet", "ghostnet" or None.
        weights: Address of the published weights, or None.
        rows: Its rows in the tables of the two papers.
    """

    name: str
    build: Callable[..., Network]
    options: Mapping[str, str]
    preparation: Preparation = IMAGENET
    conventions: tuple[str, ...] = ()
    counterpart: str | None = None
    weights: str | None = None
    rows: tuple[Row, ...] = ()

    @property
    def classifier(self) -> str:
        """Name of the head, the last and fully connected layer: `variables["params"][classifier]`."""
        return self.build().head

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the images that the network was designed for."""
        return self.preparation.size

    @property
    def smallest_image(self) -> int:
        """Smallest height and width, in pixels, that the network accepts."""
        return self.build().smallest_image

    @property
    def features(self) -> dict[str, Feature]:
        """Channels and stride of the map after each stage."""
        return self.build().feature_info()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self._total.parameters

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one image of `image_size`."""
        return self._total.multiply_adds

    @property
    def sha256(self) -> str | None:
        """First eight hex digits of the SHA-256 of the published weights, or None."""
        found = re.search(r"-([0-9a-f]{8})\.", self.weights or "")
        return found[1] if found else None

    @cached_property
    def _total(self) -> Part:
        return total(summarise(self.build(), depth=1))

    def __repr__(self) -> str:
        """Return the record as lines of text."""
        images = self.preparation
        lines = {
            "parameters": [f"{self.parameters:,}"],
            "multiply-adds": [f"{self.multiply_adds:,} at {self.image_size}×{self.image_size} px"],
            "smallest image": [f"{self.smallest_image}×{self.smallest_image} px"],
            "features": [f"{stage}: {channels} channels, stride {stride}" for stage, (channels, stride) in self.features.items()],
            "images": [f"resize {images.resize}, crop {images.size}, mean {images.mean}, std {images.std}"],
            "weights": [f"{self.weights} (SHA-256 {self.sha256}…)" if self.weights else "none published"],
            "conventions": [", ".join(self.conventions) or "its own"],
            "verify": [self.counterpart or "only with --reference"],
            "classifier": [self.classifier],
            "options": [f"{option}: {meaning}" for option, meaning in self.options.items()],
            "papers": [
                f"{row.paper}, {row.label}: {row.parameters} M, {row.multiply_adds} G, top-1 {row.top1} %" for row in self.rows
            ]
            or ["none"],
        }
        text = [self.name]
        for title, (first, *others) in lines.items():
            text += [f"  {title:15} {first}", *(f"  {'':15} {other}" for other in others)]
        return "\n".join(text)
