"""Base class of the config dataclasses, which checks names, types and ranges, and errors that end a run with one line."""

import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Self


class ConfigError(Exception):
    """A mistake that the user can correct, in the command, the config or the data. Any function may raise it. Exit code 2."""


class DivergedError(Exception):
    """Devices that must hold the same state do not. Exit code 1."""


class CheckpointError(Exception):
    """A checkpoint cannot be written: no space, no permission, no disk. Exit code 1."""


class Group:
    """Base class of a group of fields."""

    def __new__(cls, *_args: Any, **fields: Any) -> Self:
        """Refuse unknown field names. Unlike the dataclass's own error, the message suggests the nearest field."""
        known = typing.get_type_hints(cls)
        for name in fields.keys() - known.keys():
            raise ConfigError(f"{cls.__name__} has no field {name!r}{suggest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, annotation):
                raise ConfigError(
                    f"{type(self).__name__}.{name} must be {_describe(annotation)}, found {value!r}"
                    + (suggest(value, typing.get_args(annotation)) if isinstance(value, str) else "")
                )
        self._check()

    def _check(self) -> None:
        """Check the ranges of the fields. Override this."""

    def _at_least(self, lowest: int, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= lowest, name, f"at least {lowest}")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{name} must be {expected}, found {getattr(self, name)!r}")


def suggest(name: str, valid: Iterable[Any]) -> str:
    """Return the end of an error message: the valid names that resemble `name`, or all if none does."""
    import scconv_jax  # loads JAX, so only after a mistake

    names = [v for v in valid if isinstance(v, str)]
    if hint := scconv_jax.messages.did_you_mean(name, names):
        return f".{hint}"
    return f". Valid: {', '.join(names)}" if names else ""


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin is types.UnionType:
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple of {arguments[0].__name__}"
    if origin is types.UnionType:
        return " or ".join(map(_describe, arguments))
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "True or False", types.NoneType: "None"}
    return names.get(annotation, f"a {annotation.__name__}(...)")
