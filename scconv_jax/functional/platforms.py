"""`by_platform`: one form of a function for CPU, another for accelerators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from scconv_jax.shapes import Array


def by_platform(cpu: Callable[..., Array], accelerator: Callable[..., Array], *arrays: Array, **options: Any) -> Array:
    """Apply `cpu` in programs compiled for CPU and `accelerator` in all others, whichever platform traces them.

    Both forms are traced and must agree in values and gradients. A compiled program contains one of them and no conditional.

    Args:
        cpu: A function of the module, not one made for this call: its trace is kept for later calls.
        accelerator: See `cpu`.
        *arrays: Arguments of both forms.
        **options: Keyword arguments of both forms, hashable.
    """
    return _by_platform(cpu, accelerator, tuple(options.items()), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _by_platform(cpu: Callable[..., Array], accelerator: Callable[..., Array], options: Any, *arrays: Array) -> Array:
    forms = (functools.partial(form, **dict(options)) for form in (cpu, accelerator))
    return lax.platform_dependent(*arrays, cpu=next(forms), default=next(forms))
