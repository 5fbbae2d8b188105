"""Squeeze-and-excitation: rescales each channel by a factor computed from the averages of all channels.

Paper: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, Eqs. 2-4, https://arxiv.org/abs/1709.01507

    z = average of X over all pixels    s = gate(W2 ReLU(W1 z))    Y = s · X

Differences: both layers have a bias, which Eq. 3 omits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.layers.base import Layer
from scconv_jax.layers.core import Conv, Dtype
from scconv_jax.shapes import Array, Float


class SqueezeExcitation(Layer):
    """Rescale the channels: `(n, h, w, c)` to the same shape.

    Source: Hu et al., CVPR 2018, Eqs. 2-4.

    Attributes:
        hidden: Width of the hidden layer.
        gate: Function from the last layer's output to the factors.
        names: Names of the two layers, which are 1×1 convolutions with bias.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.
    """

    hidden: int
    _: dataclasses.KW_ONLY
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    names: tuple[str, str] = ("fc1", "fc2")
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Multiply each channel of each image by its factor."""
        first, second = self.names
        factors = x.mean(axis=(1, 2), keepdims=True)
        factors = nn.relu(Conv(self.hidden, 1, use_bias=True, dtype=self.dtype, name=first)(factors))
        factors = self.gate(Conv(x.shape[-1], 1, use_bias=True, dtype=self.dtype, name=second)(factors))
        return x * jnp.broadcast_to(factors, x.shape)
