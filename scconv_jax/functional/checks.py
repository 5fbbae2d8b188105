"""Checks that operators and layers share; each error names the values that would do."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from scconv_jax.shapes import Array


def check_whole(**values: Any) -> None:
    """Raise a ValueError unless each value, where it is given, is a whole number of 1 or more."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            hint = " It holds for height and width alike." if isinstance(value, tuple) else ""
            raise ValueError(f"{name}={value!r} must be one whole number, 1 or more.{hint}")


def check_maps(function: str, x: Array) -> None:
    """Raise a ValueError unless `x` has the four axes of maps, `(n, h, w, c)`."""
    if x.ndim != 4:
        hint = " For one map by itself, x[None] adds the first axis." if x.ndim == 3 else ""
        raise ValueError(f"{function}: expected maps of shape (n, h, w, c), channels last; got {x.shape}.{hint}")


def halves_exist(channels: int) -> None:
    """Raise a ValueError where channels cannot be split in two halves."""
    if channels % 2:
        raise ValueError(
            f"The channels are split in two halves; {channels} is odd. Use {channels - 1} or {channels + 1} channels."
        )


def check_odd(**sizes: int) -> None:
    """Raise a ValueError unless each size of a kernel is odd, so that it has a centre, and padding that keeps a map's size."""
    check_whole(**sizes)
    for name, size in sizes.items():
        if size % 2 == 0:
            raise ValueError(f"{name}={size} must be odd, for the kernel to have a centre. Use {size - 1} or {size + 1}.")


def check_divides(name: str, divisor: int, what: str, *channels: int) -> None:
    """Raise a ValueError, naming the nearest values that would do, unless `divisor` divides all of `channels`."""
    common = math.gcd(*channels)
    if divisor < 1 or common % divisor:
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        nearest = [
            max((d for d in divisors if d < divisor), default=None),
            min((d for d in divisors if d > divisor), default=None),
        ]
        raise ValueError(
            f"{name}={divisor} must divide {what}, {' and '.join(map(str, channels))}. "
            f"Nearest that do: {' and '.join(str(d) for d in nearest if d)}."
        )
