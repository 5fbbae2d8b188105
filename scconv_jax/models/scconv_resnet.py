"""Residual networks with ScConv in place of their 3×3 convolutions.

Paper: Li, Wen, He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023, pp. 6153-6162.

Differences: the paper does not say which convolutions it replaced. Here ScConv replaces the 3×3 convolution of every bottleneck
and the second convolution of every basic block, which fits the paper's parameter counts best.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from scconv_jax.layers.core import Factory
from scconv_jax.layers.reconstruction import scconv_factory
from scconv_jax.models.blocks import BasicBlock, Bottleneck
from scconv_jax.models.resnet import NARROW, RESNEXT29, WIDE, ResNet
from scconv_jax.models.spec import ABOVE_EQ_11, DILATED, RECONSTRUCTION, SMALL_IMAGES, WIDTH_UNKNOWN, ModelSpec, Row

# Two partial objects are never equal; a cached one keeps equal networks equal.
_cached_partial = functools.cache(partial)


def scconv_resnet(
    block: Factory, stage_sizes: tuple[int, ...], *, alpha: float = 0.5, variant: str = "paper", **options: Any
) -> ResNet:
    """Return a residual network of ScConv, given a block that accepts its 3×3 convolution as `conv`.

    `alpha` and `variant` are ScConv's, `stage_sizes` and `options` are attributes of `ResNet`.
    """
    conv = scconv_factory(alpha=alpha, variant=variant)
    return ResNet(_cached_partial(block, conv=conv), stage_sizes, **options)


_IMAGENET = partial(ModelSpec, options=DILATED | RECONSTRUCTION, counterpart="resnet", conventions=("torchvision",))
_SMALL = partial(_IMAGENET, preparation=SMALL_IMAGES)
_RESNEXT = partial(Bottleneck, expansion=2)

SPECS = (
    _IMAGENET(
        "scconv_resnet50",
        partial(scconv_resnet, Bottleneck, (3, 4, 6, 3)),
        rows=(
            Row(2023, "ResNet-50, α = 1/2", 16.78, 2.70, 76.41, (2.0, 3.0), ABOVE_EQ_11),
            Row(2023, "ResNet-50, α = 3/4", 17.69, 2.87, 76.79, (2.0, 4.0), ABOVE_EQ_11, {"alpha": 0.75}),
        ),
    ),
    _IMAGENET(
        "scconv_resnet101",
        partial(scconv_resnet, Bottleneck, (3, 4, 23, 3)),
        rows=(Row(2023, "ResNet-101, α = 1/2", 28.00, 4.90, 77.93, (2.0, 3.0), ABOVE_EQ_11),),
    ),
    _SMALL("scconv_resnet20_small", partial(scconv_resnet, Bottleneck, (2, 2, 2), **NARROW)),
    _SMALL(
        "scconv_resnet56_small",
        partial(scconv_resnet, BasicBlock, (9, 9, 9), **NARROW),
        rows=(Row(2023, "ResNet-56, ScConv", 0.52, 0.07955, 72.56, (2.0, 5.0), ABOVE_EQ_11),),
    ),
    _SMALL(
        "scconv_resnet50_small",
        partial(scconv_resnet, Bottleneck, (3, 4, 6, 3), **WIDE),
        rows=(Row(2023, "ResNet-50, ScConv", 14.69, 0.831, 79.89, (2.0, 2.0), ABOVE_EQ_11),),
    ),
    _SMALL(
        "scconv_resnext29_small",
        partial(scconv_resnet, _RESNEXT, (3, 3, 3), **RESNEXT29),
        rows=(Row(2023, "ResNeXt-29, ScConv", 22.31, 3.57, 82.56, (14.0, 12.0), WIDTH_UNKNOWN),),
    ),
)
