"""ReLU for maps that are stored anyway, such as the result of a residual block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.platforms import by_platform
from scconv_jax.shapes import Array, Float


def relu_of_sum(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return max(x, 0) of a sum `x` of maps, with `jax.nn.relu`'s gradient.

    For the gradient, XLA would compute the sum once more, from all maps that it needs. On accelerators, the gradient reads the
    result instead, whose sign says the same.
    """
    return by_platform(plain_relu, stored_relu, x)


def plain_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return max(x, 0), with the gradient as XLA computes it."""
    return jax.nn.relu(x)


@jax.custom_jvp
def stored_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return max(x, 0). Its gradient reads the result."""
    return jnp.maximum(x, 0)


@stored_relu.defjvp
def _stored_relu_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    # Without the barrier, XLA replaces the sign of the result by that of the sum.
    y = lax.optimization_barrier(stored_relu(*primals))
    return y, jnp.where(y > 0, *tangents, 0)
