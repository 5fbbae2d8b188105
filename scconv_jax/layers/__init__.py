"""Flax modules that stand in for a convolution, and the plain layers that networks are made of."""

from scconv_jax.layers.core import BatchNorm, Conv, ConvNorm, Dense, conv1x1, conv3x3
from scconv_jax.layers.ghost import GhostConv
from scconv_jax.layers.reconstruction import CRU, SRU, ScConv
from scconv_jax.layers.self_calibrated import SelfCalibratedConv, SelfCalibration
from scconv_jax.layers.squeeze_excitation import SqueezeExcitation

__all__ = [
    "CRU",
    "SRU",
    "BatchNorm",
    "Conv",
    "ConvNorm",
    "Dense",
    "GhostConv",
    "ScConv",
    "SelfCalibratedConv",
    "SelfCalibration",
    "SqueezeExcitation",
    "conv1x1",
    "conv3x3",
]
