"""Residual networks whose 3×3 convolutions are spatial and channel reconstruction convolutions.

Paper: Li, Wen, He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023, pp. 6153-6162.

Differences: the paper does not say which convolutions it replaced. Here it is the 3×3 of every bottleneck, and in blocks of two
3×3 convolutions the second; by the parameter counts of its tables nothing fits better.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from scconv_jax.layers.core import Factory
from scconv_jax.layers.reconstruction import scconv_factory
from scconv_jax.models.blocks import BasicBlock, Bottleneck
from scconv_jax.models.resnet import NARROW, RESNEXT29, WIDE, ResNet


def scconv_resnet(
    block: Factory,
    stage_sizes: tuple[int, ...],
    *,
    alpha: float = 0.5,
    variant: str = "paper",
    num_classes: int = 1000,
    **trunk: Any,
) -> ResNet:
    """Make a residual network of ScConv.

    Args:
        block: factory of a block that takes its 3×3 convolution as `conv`.
        stage_sizes: number of blocks of each stage.
        alpha: α of the operators, between 0 and 1.
        variant: of the operators: "paper", "2023-07", "2023-09" or "2023-10".
        num_classes: length of the logits.
        **trunk: other attributes of `ResNet`.

    Returns:
        The network, a Flax module.

    Raises:
        ValueError: for an `alpha` or a `variant` that does not exist.
    """
    block = _with_conv(block, scconv_factory(alpha=alpha, variant=variant))
    return ResNet(block, stage_sizes, num_classes=num_classes, **trunk)


@functools.cache
def _with_conv(block: Factory, conv: Factory) -> Factory:
    """Hand a block its convolution; cached, since two partial objects are never equal, and networks made alike should be."""
    return partial(block, conv=conv)


MODELS = {
    "scconv_resnet50": partial(scconv_resnet, Bottleneck, (3, 4, 6, 3)),
    "scconv_resnet101": partial(scconv_resnet, Bottleneck, (3, 4, 23, 3)),
    "scconv_resnet20_small": partial(scconv_resnet, Bottleneck, (2, 2, 2), **NARROW),
    "scconv_resnet56_small": partial(scconv_resnet, BasicBlock, (9, 9, 9), **NARROW),
    "scconv_resnet50_small": partial(scconv_resnet, Bottleneck, (3, 4, 6, 3), **WIDE),
    "scconv_resnext29_small": partial(scconv_resnet, partial(Bottleneck, expansion=2), (3, 3, 3), **RESNEXT29),
}
