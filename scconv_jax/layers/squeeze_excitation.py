"""Squeeze-and-excitation: channels rescaled by what their averages say.

Paper: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, Eqs. 2-4. Differences: none.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.layers.core import Conv, Dtype
from scconv_jax.shapes import Array, Float


class SqueezeExcitation(nn.Module):
    """Rescale channels: `(n, h, w, c)` to the same shape.

    Attributes:
        hidden: width of the hidden layer.
        gate: from the last layer to the factors.
        names: of the two layers, 1×1 convolutions with bias.
        dtype: of the computation.
    """

    hidden: int
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    names: tuple[str, str] = ("fc1", "fc2")
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Multiply each channel of each image by a number between 0 and 1."""
        first, second = self.names
        factors = x.mean(axis=(1, 2), keepdims=True)
        factors = nn.relu(Conv(self.hidden, 1, use_bias=True, dtype=self.dtype, name=first)(factors))
        factors = self.gate(Conv(x.shape[-1], 1, use_bias=True, dtype=self.dtype, name=second)(factors))
        return x * jnp.broadcast_to(factors, x.shape)
