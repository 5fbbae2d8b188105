"""`by_platform`: one form of a function for CPU, another for accelerators."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax

from scconv_jax.shapes import Array


def by_platform(cpu: Callable[..., Array], accelerator: Callable[..., Array], *arrays: Array) -> Array:
    """Apply `cpu` in programs compiled for CPU and `accelerator` in all others, whichever platform traces them.

    Both forms are traced and must agree in values and gradients. A compiled program contains one of them and no conditional.
    """
    return lax.platform_dependent(*arrays, cpu=cpu, default=accelerator)
