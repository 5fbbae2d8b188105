"""Flax modules that replace a convolution in any network, and the basic layers of the networks here.

    self_calibrated.py       SelfCalibratedConv, SelfCalibration    SC-Conv, 2020: layer(x, train=train)
    reconstruction.py        ScConv, SRU, CRU                       ScConv, 2023: layer(x)
    variants.py              VARIANTS, ARRANGEMENTS                 the options of ScConv, and the rules that channels must follow
    ghost.py                 GhostConv                              GhostNet, 2020: layer(x), or layer(x, train=train) with norms
    squeeze_excitation.py    SqueezeExcitation                      channel rescaling: layer(x)
    base.py                  Layer                                  base class: options, and what layers inside inherit
    core.py                  Conv, BatchNorm, ConvNorm, Dense       with PyTorch's rules and initial values; conv1x1, conv3x3

Every layer is built as `layer(features, *, ..., dtype=None, param_dtype=None, kernel_init=None, name=None)` and takes maps
`(n, h, w, c)`. Layers that ignore `train` still accept it, except `SqueezeExcitation`. A norm is passed as a `Factory`, called
`norm(dtype=..., name=...)`.
"""

from scconv_jax.layers.base import Dtype, Layer
from scconv_jax.layers.core import BatchNorm, Conv, ConvNorm, Dense, Factory, conv1x1, conv3x3
from scconv_jax.layers.ghost import GhostConv
from scconv_jax.layers.reconstruction import CRU, SRU, ScConv
from scconv_jax.layers.self_calibrated import SelfCalibratedConv, SelfCalibration
from scconv_jax.layers.squeeze_excitation import SqueezeExcitation
from scconv_jax.layers.variants import ARRANGEMENTS, VARIANTS

__all__ = [
    "ARRANGEMENTS",
    "CRU",
    "SRU",
    "VARIANTS",
    "BatchNorm",
    "Conv",
    "ConvNorm",
    "Dense",
    "Dtype",
    "Factory",
    "GhostConv",
    "Layer",
    "ScConv",
    "SelfCalibratedConv",
    "SelfCalibration",
    "SqueezeExcitation",
    "conv1x1",
    "conv3x3",
]
