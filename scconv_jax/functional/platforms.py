"""`by_platform`: one form of a function for CPU, another for accelerators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from scconv_jax.shapes import Array


def by_platform(
    cpu: Callable[..., Any],
    accelerator: Callable[..., Any],
    *arrays: Array,
    gpu: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Apply `cpu` in programs compiled for CPU and `accelerator` in all others, whichever platform traces them.

    All forms are traced and must agree in values and gradients. A compiled program contains one of them and no conditional.

    Args:
        cpu: A function of the module, not one made for this call: its trace is kept for later calls.
        accelerator: See `cpu`.
        *arrays: Arguments of all forms.
        gpu: The form for GPUs. If None, `accelerator`.
        **options: Keyword arguments of all forms, hashable.
    """
    return _by_platform(cpu, accelerator, gpu, tuple(options.items()), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _by_platform(cpu: Any, accelerator: Any, gpu: Any, options: tuple[tuple[str, Any], ...], *arrays: Array) -> Any:
    forms = {"cpu": cpu, "default": accelerator} | ({"cuda": gpu, "rocm": gpu} if gpu else {})
    return lax.platform_dependent(*arrays, **{name: functools.partial(form, **dict(options)) for name, form in forms.items()})
