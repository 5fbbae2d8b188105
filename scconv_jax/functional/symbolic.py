"""Symbolic sizes: the batches, heights and widths that `jax.export` leaves open.

    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 32*h, 32*w, 3", constraints=["h >= 4", "w >= 4"]), jnp.float32)
    exported = jax.export.export(jax.jit(functools.partial(model.apply, train=False)))(variables, images)

JAX calculates with symbolic sizes as with integers. A comparison that depends on their values is an error, which `is_below` and
`is_multiple` turn into one that names the constraint to give.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax.numpy as jnp

from scconv_jax.shapes import Array

Size = Any
"""An integer, or a symbolic size."""

_GIVE = "For jax.export, give jax.export.symbolic_shape"


def is_symbolic(*sizes: Size) -> bool:
    """Return whether one of the sizes is not a plain integer."""
    return not all(isinstance(size, int) for size in sizes)


def value(size: Size, dtype: Any) -> Array | int:
    """Return a size to calculate with: a symbolic one as an array, an integer as it is."""
    return jnp.asarray(size).astype(dtype) if is_symbolic(size) else size


def is_below(size: Size, least: int) -> bool:
    """Return whether a size is below `least`.

    Raises:
        ValueError: It depends on the value of a symbolic size.
    """
    try:
        return bool(size < least)
    except Exception as error:  # JAX's error for an inconclusive comparison has no public name
        if not _is_inconclusive(error):
            raise
        factor, name = _product(size)
        constraint = f"{name} >= {-(-least // factor)}"
        raise ValueError(
            f"The symbolic size {size} may be below {least}, the smallest possible here. {_GIVE} the constraint {constraint!r}."
        ) from error


def is_multiple(size: Size, of: int) -> bool:
    """Return whether a size is a multiple of `of`; for a symbolic size, whether that is certain."""
    try:
        return bool(size % of == 0)
    except Exception as error:  # JAX's error for an inconclusive comparison has no public name
        if not _is_inconclusive(error):
            raise
        return False


def check_multiple(size: Size, of: int, plus: int = 0) -> None:
    """Raise a ValueError if `size` is symbolic and `size + plus` is not certainly a multiple of `of`."""
    if is_symbolic(size) and not is_multiple(size + plus, of):
        factor, name = _product(size)
        what = f"{size} + {plus % of}" if plus % of else size
        advice = f" {_GIVE} the size as {math.lcm(factor, of)}*{name}." if name.isidentifier() and not plus % of else ""
        raise ValueError(f"The symbolic size {what} must be a multiple of {of} here.{advice}")


def _product(size: Size) -> tuple[int, str]:
    """Return 32 and "h" for the symbolic size 32*h; for other expressions, 1 and their text."""
    found = re.fullmatch(r"(\d+)\*(\w+)", str(size))
    return (int(found[1]), found[2]) if found else (1, str(size))


def _is_inconclusive(error: Exception) -> bool:
    return any(kind.__name__ == "InconclusiveDimensionOperation" for kind in type(error).__mro__)  # it has no public name
