"""Mean and variance of each channel, in the form that is fastest on each platform.

CPU takes two passes over the maps: the mean, then the squares of the differences from it. On accelerators a pass costs more than
its arithmetic, so both sums are computed in one, often by the kernel that writes the maps. E[x²] - E[x]² would lose digits if the
mean is large, so the sums are those of differences from a shift near the mean.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from scconv_jax.functional.platforms import by_platform
from scconv_jax.shapes import Array, Float


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
