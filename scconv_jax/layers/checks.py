"""Checks of attributes that layers, blocks and networks share, by the name of the attribute."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.functional.checks import check_between, check_float_dtype, check_fraction, check_positive_int, nearest_int

SIZES = ("kernel_size", "cheap_size", "strides", "dilation", "pooling")
"""Attributes of one number for height and width, for which a pair of equal numbers is accepted."""


def check_flag(**values: Any) -> None:
    """Raise a ValueError unless each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False.")


def check_factory(**values: Any) -> None:
    """Raise a ValueError unless each value can be called, as a module's class or a `functools.partial` of one can."""
    for name, value in values.items():
        if not callable(value) or isinstance(value, nn.Module):
            raise ValueError(
                f"{name}={value!r:.100} must be the class of a module, such as scconv_jax.layers.BatchNorm, or a "
                "functools.partial of one."
            )


def check_axis_name(**values: Any) -> None:
    """Raise a ValueError unless each value is the name of an axis or a tuple of names."""
    for name, value in values.items():
        if not isinstance(value, str) and not (isinstance(value, tuple) and all(isinstance(axis, str) for axis in value)):
            hint = f" Use {tuple(value)!r}." if isinstance(value, list) else ""
            raise ValueError(f"{name}={value!r} must be the name of a mapped axis, or a tuple of names.{hint}")


def check_positive_ints(name: str, values: Any, what: str, count: int | None = None) -> tuple[int, ...]:
    """Return a tuple, or a list, which JSON makes of it, of positive integers as a tuple.

    Raises:
        ValueError: It is none, or its length is not `count`.
    """
    if not isinstance(values, (tuple, list)) or not values or count not in (None, len(values)):
        raise ValueError(f"{name}={values!r:.100} must be a tuple with {what}.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(
                f"{name}={values!r:.100} must be a tuple with {what}, each a positive integer; got {value!r:.50}."
                f"{nearest_int(value, 1)}"
            )
    return tuple(values)


def check_initializer(**values: Any) -> None:
    """Raise a ValueError unless each value is a function of key, shape and dtype that makes an array."""
    for name, value in values.items():
        problem = _problem_of_initializer(value) if callable(value) else ""
        if problem or not callable(value):
            raise ValueError(
                f"{name}={getattr(value, '__name__', repr(value))} must be a function (key, shape, dtype) → array, such as "
                f"flax.linen.initializers.he_normal().{problem}"
            )


@functools.lru_cache(maxsize=128)
def _problem_of_initializer(value: Callable[..., Any]) -> str:
    try:
        inspect.signature(value).bind(None, (1,), None)
    except TypeError as error:
        return f" Called so, it fails: {error}."
    except ValueError:  # a function without a signature
        return ""
    made: list[Any] = []
    with contextlib.suppress(Exception):  # it may be for other shapes, or not for tracing
        jax.eval_shape(lambda: made.append(value(jax.random.key(0), (3, 3, 4, 4), jnp.float32)))
    return f" It returns a function: give {value.__name__}()." if made and callable(made[0]) else ""


_OTHER_SIZES = ("bottleneck_width", "se_reduction", "expansion", "stem_stride", "smallest_map", "image_size")
_CHECKS: Mapping[str, Mapping[str, Callable[..., None]]] = {
    "int": dict.fromkeys(
        (*SIZES, "features", "groups", "conv_groups", "squeeze", "planes", "hidden", "growth", "width", *_OTHER_SIZES),
        check_positive_int,
    ),
    "float": {
        **dict.fromkeys(("dropout", "drop_path"), check_fraction),
        "momentum": functools.partial(check_between, 0.0, 1.0),
        "threshold": functools.partial(check_between, -math.inf, math.inf),
        "epsilon": functools.partial(check_between, 0.0, math.inf),
    },
    "bool": dict.fromkeys(
        ("rematerialise", "relu", "use_bias", "stem_pool", "transition", "avd", "avg_down", "unbiased", "inclusive"), check_flag
    ),
    "Factory": dict.fromkeys(("norm", "conv", "first", "pointwise", "block", "stem"), check_factory),
    "Dtype": dict.fromkeys(("dtype", "param_dtype"), check_float_dtype),
    "str": {"axis_name": check_axis_name},
    "nn.initializers.Initializer": {"kernel_init": check_initializer},
}
"""The check of an attribute by its type, as written, and its name: a layer of one's own may use a name for another thing."""


@functools.cache
def checks_of(layer: type[nn.Module]) -> list[tuple[str, Callable[..., None], bool]]:
    """Return each attribute that is checked, its check, and whether None is valid, for `Layer.__post_init__`."""
    found = []
    for field in dataclasses.fields(layer):
        kind, *others = str(field.type).split(" | ")
        if check := _CHECKS.get(kind, {}).get(field.name):
            found.append((field.name, check, "None" in others))
    return found
