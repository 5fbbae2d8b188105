"""Argument checks shared by operators, layers and networks. Each error names values that would be valid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp

from scconv_jax.messages import did_you_mean
from scconv_jax.shapes import Array


def check_positive_int(**values: Any) -> None:
    """Raise a ValueError unless each value is a positive integer or None."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            hint = " It applies to both height and width." if isinstance(value, (tuple, list)) else nearest_int(value, 1)
            raise ValueError(f"{name}={value!r} must be one positive integer.{hint}")


def nearest_int(value: Any, lowest: int) -> str:
    """Return a sentence with the integers from `lowest` on that are nearest to a number or its text, or an empty string."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (Real, str)) else float(value)
        found = sorted({max(lowest, math.floor(number)), max(lowest, math.ceil(number))})
    except (ValueError, OverflowError):  # no number, NaN, infinity
        return ""
    return f" Nearest valid value: {' or '.join(map(str, found))}."


def check_odd(**sizes: int) -> None:
    """Raise a ValueError unless each kernel size is a positive odd integer: only an odd kernel has a centre."""
    check_positive_int(**sizes)
    for name, size in sizes.items():
        if size % 2 == 0:
            raise ValueError(f"{name}={size} must be odd, so that the kernel has a centre. Use {size - 1} or {size + 1}.")


def check_choice(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the nearest choice, unless `value` is one of `choices`."""
    known = list(choices)
    if value not in known:
        hint = did_you_mean(value, known, most=1, cutoff=0.3)
        raise ValueError(f"Unknown {name} {value!r}.{hint} Choose from {', '.join(map(repr, known))}.")


def check_float_dtype(**values: Any) -> None:
    """Raise a ValueError unless each value is a floating-point dtype, by whatever name."""
    for name, dtype in values.items():
        try:
            possible = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            possible = False
        if not possible:
            hint = did_you_mean(dtype, ("float32", "bfloat16", "float16", "float64"), most=1) if isinstance(dtype, str) else ""
            raise ValueError(
                f"{name}={dtype!r} is not a floating-point dtype.{hint} Use jnp.float32, jnp.bfloat16, jnp.float16 or, with "
                "64-bit JAX, jnp.float64."
            )


def check_fraction(**values: Any) -> None:
    """Raise a ValueError unless each value is a number from 0 to below 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
            near = _nearest_fraction(value)
            raise ValueError(f"{name}={value!r} must be a probability from 0 to below 1; 0 switches it off.{near}")


def _nearest_fraction(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return ""
    percent = f", or {value / 100:g} if it is in percent" if 2 <= value < 100 else ""
    return f" Nearest valid value: {0 if value < 0 else 0.99}{percent}."


def check_between(low: float, high: float, **values: Any) -> None:
    """Raise a ValueError unless each value is a number from `low` to `high`, both included."""
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not low <= float(value) <= high:
            near = f" Nearest valid value: {low if value < low else high:g}." if number and not math.isnan(value) else ""
            rules = {(-math.inf, math.inf): "a number", (0.0, math.inf): "0 or a positive number"}
            rule = rules.get((low, high), f"a number from {low:g} to {high:g}")
            raise ValueError(f"{name}={value!r} must be {rule}.{near}")


def check_padding(padding: Any) -> None:
    """Raise a ValueError unless `padding` is 0 or a positive integer."""
    if isinstance(padding, bool) or not isinstance(padding, Integral) or padding < 0:
        raise ValueError(
            f"padding={padding!r} must be one number, the zeros on each side: dilation * (kernel size // 2) keeps the size at "
            'stride 1, 0 is "VALID".'
        )


def check_maps(function: str, x: Array) -> None:
    """Raise a ValueError unless `x` has four axes, `(n, h, w, c)`."""
    if x.ndim != 4:
        hint = " For a single map, x[None] adds the first axis." if x.ndim == 3 else ""
        raise ValueError(f"{function}: expected maps of shape (n, h, w, c), channels last; got {x.shape}.{hint}")


def check_even(channels: int) -> None:
    """Raise a ValueError unless `channels` can be split into two halves."""
    if channels % 2:
        raise ValueError(
            f"The channels are split into two halves, but {channels} is odd. Use "
            f"{f'{channels - 1} or ' if channels > 1 else ''}{channels + 1} channels."
        )


def check_divides(name: str, divisor: int, what: str, *channels: int) -> None:
    """Raise a ValueError that names the nearest valid divisors, unless `divisor` divides all `channels`."""
    common = math.gcd(*channels)
    if divisor < 1 or common % divisor:
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        below = max((d for d in divisors if d < divisor), default=None)
        above = min((d for d in divisors if d > divisor), default=None)
        raise ValueError(
            f"{name}={divisor} must divide {what}, {' and '.join(map(str, channels))}. "
            f"Nearest valid values: {' and '.join(str(d) for d in (below, above) if d)}."
        )


def check_spatial(
    x: Array, gamma: Array, beta: Array, *, groups: int, threshold: float, epsilon: float, gate: str, gated: str
) -> None:
    """Raise a ValueError unless the arguments of `spatial_reconstruction` fit one another."""
    check_maps("spatial_reconstruction", x)
    channels = x.shape[-1]
    check_even(channels)
    check_positive_int(groups=groups)
    check_divides("groups", groups, "the channels", channels)
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector.shape != (channels,):
            hint = " Maps are (n, h, w, c), channels last." if vector.shape == x.shape[1:2] else ""
            raise ValueError(
                f"{name} must have one value for each of the {channels} channels of x, ({channels},); got {vector.shape}.{hint}"
            )
    check_between(-math.inf, math.inf, threshold=threshold)
    check_between(0.0, math.inf, epsilon=epsilon)
    check_choice("gate", gate, ("soft", "hard"))
    check_choice("gated", gated, ("input", "norm"))


def check_channel(
    x: Array, squeeze1: Array, squeeze2: Array, gwc: Array, gwc_bias: Array, pwc1: Array, pwc2: Array | None,
    conv_groups: int, dilation: int,
) -> None:  # fmt: skip
    """Raise a ValueError unless the arguments of `channel_reconstruction` fit one another."""
    check_maps("channel_reconstruction", x)
    check_positive_int(conv_groups=conv_groups, dilation=dilation)
    (upper, squeezed), (lower, low), features = squeeze1.shape[2:], squeeze2.shape[2:], pwc1.shape[3]
    if upper + lower != x.shape[-1]:
        raise ValueError(f"squeeze1 and squeeze2 take {upper} and {lower} channels; their sum must be those of x, {x.shape[-1]}.")
    check_divides("conv_groups", conv_groups, "the channels of squeeze1's output and of gwc's", squeezed, gwc.shape[3])
    expected = {
        "gwc": (gwc, (*gwc.shape[:2], squeezed // conv_groups, features)),
        "gwc_bias": (gwc_bias, (features,)),
        "pwc1": (pwc1, (1, 1, squeezed, features)),
        "pwc2": (pwc2, (1, 1, low, features - low)),
    }
    for name, (array, shape) in expected.items():
        found = (1, 1, low, 0) if array is None else array.shape
        if found != shape:
            got = "None" if array is None else found
            raise ValueError(f"{name} must have the shape {shape}, to which the other kernels lead; got {got}.")
