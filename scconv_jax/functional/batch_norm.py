"""Batch normalisation, as `torch.nn.functional.batch_norm`, with the moments in the form that is fastest on each platform.

CPU takes two passes over the maps: the mean, then the squares of the differences from it. On accelerators a pass costs more than
its arithmetic, so both sums are computed in one, often by the kernel that writes the maps. E[x²] - E[x]² would lose digits if the
mean is large, so the sums are those of differences from a shift near the mean.

Both ways to normalise are jitted, because a network has a hundred norms of few shapes: JAX traces and differentiates each shape
once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.platforms import by_platform
from scconv_jax.functional.symbolic import value
from scconv_jax.shapes import Array, Float


def normalize_by_batch(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    running: tuple[Float[Array, " c"], Float[Array, " c"]],
    *,
    momentum: float,
    epsilon: float,
    axis_name: str | tuple[str, ...] | None,
    dtype: Any,
) -> tuple[Float[Array, "*batch c"], tuple[Float[Array, " c"], Float[Array, " c"]]]:
    """Normalise by the mean and the biased variance of the batch. Also return the running mean and variance that follow."""
    x = x.astype(computation_dtype(x, dtype))
    # `x` is given twice: the gradients through the maps and through the moments are added to those of its other uses one by one,
    # in this order. Added to each other first, they would round differently, and runs of earlier versions would not resume bit
    # for bit.
    return _normalize_by_batch(x, x, scale, bias, running, momentum, epsilon, axis_name, dtype)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _normalize_by_batch(
    x: Array,
    seen: Array,
    scale: Array,
    bias: Array,
    running: tuple[Array, Array],
    momentum: float,
    epsilon: float,
    axis_name: str | tuple[str, ...] | None,
    dtype: Any,
) -> tuple[Array, tuple[Array, Array]]:
    mean, var = moments(seen, running[0].astype(x.dtype), axis_name)
    count = value(x.size // x.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name)), x.dtype)
    unbiased = lax.stop_gradient(var) * (count / (count - 1))
    latest = (lax.stop_gradient(mean), unbiased)
    kept = [(momentum * old + (1 - momentum) * new).astype(old.dtype) for old, new in zip(running, latest, strict=True)]
    return normalize(x, scale, bias, mean, var, epsilon, dtype), (kept[0], kept[1])


@functools.partial(jax.jit, static_argnums=(5, 6))
def normalize(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    mean: Float[Array, " c"],
    var: Float[Array, " c"],
    epsilon: float,
    dtype: Any,
) -> Float[Array, "*batch c"]:
    """Return `(x - mean) / sqrt(var + epsilon) * scale + bias` in `dtype`, computed in float32 or wider."""
    x, scale, bias, mean, var = (array.astype(computation_dtype(x, dtype)) for array in (x, scale, bias, mean, var))
    # A single multiply-add per element.
    factor = scale * lax.rsqrt(var + epsilon)
    offset = bias - mean * factor
    return (x * over_channels(factor, x) + over_channels(offset, x)).astype(dtype)


def computation_dtype(x: Array, dtype: Any) -> Any:
    """Return the dtype of statistics: float32 or, if the input or the result has a wider one, that."""
    return jnp.promote_types(jnp.promote_types(x.dtype, dtype), jnp.float32)


def moments(
    x: Float[Array, "*batch c"], shift: Float[Array, " c"], axis_name: str | tuple[str, ...] | None = None
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Return mean and biased variance of each channel, `(c,)`, in the dtype of `x`.

    Args:
        x: Values, `(..., c)`.
        shift: An estimate of the mean, such as a running mean. If it is k standard deviations from the mean, the rounding error
            of the variance on accelerators grows with k².
        axis_name: Mapped axis or axes whose devices share the moments. If None, each device has its own.
    """
    mean, var = by_platform(two_pass_moments, one_pass_moments, x, lax.stop_gradient(shift))
    if axis_name is not None:
        own = mean
        mean = lax.pmean(own, axis_name)
        var = lax.pmean(var + jnp.square(own - mean), axis_name)
    return mean, var


def two_pass_moments(x: Float[Array, "*batch c"], shift: Float[Array, " c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Compute the mean, then the variance. The shift is not needed."""
    del shift
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    # The derivative of the variance with respect to the mean is 0, since Σ(x - mean) = 0; `stop_gradient` spares the backward
    # pass from computing it.
    return mean, jnp.square(x - over_channels(lax.stop_gradient(mean), x)).mean(axes)


def one_pass_moments(x: Float[Array, "*batch c"], shift: Float[Array, " c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Compute both from the sums of the shifted values and of their squares."""
    axes = tuple(range(x.ndim - 1))
    shifted = x - over_channels(shift, x)
    mean = shifted.mean(axes)
    return shift + mean, jnp.maximum(jnp.square(shifted).mean(axes) - jnp.square(mean), 0)


def over_channels(values: Float[Array, " c"], x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
    """Broadcast one value per channel to the shape of `x`."""
    return lax.broadcast_in_dim(values, x.shape, (x.ndim - 1,))
