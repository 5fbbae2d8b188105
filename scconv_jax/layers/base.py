"""`Layer`, the base of all layers, blocks and networks: how they are constructed, and what they pass on to the layers inside.

Only the first attributes of a layer may be given by position (`features`), so that no number is taken for another. Options of
other libraries are refused with what to write instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from flax import linen as nn

from scconv_jax.layers.checks import SIZES, checks_of
from scconv_jax.messages import did_you_mean

Dtype = Any
"""Anything that JAX accepts as a dtype: `jnp.bfloat16`, `"float32"`, `np.dtype(...)`."""
_Value = TypeVar("_Value")
_Class = TypeVar("_Class", bound="Layer")

_INSIDE = "Give it to the norm: norm=functools.partial(scconv_jax.layers.BatchNorm, axis_name=..., momentum=...)."
_OUTSIDE = "Nothing follows the last convolution: apply it to the result, flax.linen.relu(layer(x))."
_READ = "The channels of the input are read from the input: leave it out."
_TRAIN = "Say it in the call: layer(x, train=True)."
_FIXED = "The layer pads so that stride 1 keeps height and width: leave it out."
_BIASES = "The layer has the biases of its reference implementation: leave it out."
ADVICE = {
    **dict.fromkeys(("padding", "kernel_padding"), _FIXED),
    **dict.fromkeys(("use_bias", "bias", "bias_init"), _BIASES),
    **dict.fromkeys(("in_features", "in_channels"), _READ),
    **dict.fromkeys(("train", "training", "deterministic", "use_running_average"), _TRAIN),
    "rngs": "This is a Linen module; in NNX, wrap it: flax.nnx.bridge.ToNNX(layer, rngs=rngs).",
    **dict.fromkeys(("key", "seed"), "Weights are made by layer.init(key, x)."),
    **dict.fromkeys(("activation", "act"), _OUTSIDE),
    "data_format": "Maps are (n, h, w, c), channels last: leave it out.",
    "precision": "Use jax.default_matmul_precision.",
}
"""Answers to options of the convolutions of Flax, PyTorch and Keras that a layer here does not have."""
_RENAMED = {
    **dict.fromkeys(("stride", "window_strides"), ("strides",)),
    **dict.fromkeys(("kernel_dilation", "rhs_dilation"), ("dilation",)),
    "dilation_rate": ("dilation",),
    **dict.fromkeys(("feature_group_count", "group_size"), ("conv_groups", "groups")),
    **dict.fromkeys(("out_features", "out_channels", "op_channel", "oup_channels", "filters", "units"), ("features",)),
    **dict.fromkeys(("group_num", "num_groups"), ("groups",)),
    "eps": ("epsilon",),
    "gate_treshold": ("threshold",),
    "squeeze_radio": ("squeeze",),
    "group_kernel_size": ("kernel_size",),
    "kernel_initializer": ("kernel_init",),
    **dict.fromkeys(("pooling_r", "r"), ("pooling",)),
}


class Layer(nn.Module, kw_only=True):
    """Base class of layers, blocks and networks.

    A pair of equal numbers is accepted where one number serves height and width: `strides=(2, 2)`, `kernel_size=(3, 3)`.

    Attributes:
        param_dtype: Dtype of the parameters. If None, that of the enclosing layer or network; float32 if that has none either.
            Running statistics are float32, or float64 for float64 parameters.
        kernel_init: Initialiser of the kernels, `(key, shape, dtype)` to an array. If None, that of the enclosing layer or
            network; PyTorch's initial values if that has none either.

    Raises:
        TypeError: An option is unknown, or may not be given by position.
        ValueError: A value is out of range.
    """

    param_dtype: Dtype | None = None
    kernel_init: nn.initializers.Initializer | None = None

    advice: ClassVar[Mapping[str, str]] = {}  # answers to unknown options, before those of ADVICE

    def __new__(cls: type[_Class], *values: Any, **options: Any) -> _Class:  # Self, which beartype does not know here
        """Refuse values by position, and options, that the layer does not have. Unlike Python's errors, these say what to do."""
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        first = [name for name, field in fields.items() if not field.kw_only]
        if len(values) > len(first):
            fixed = cls.advice.get("kernel_size", "")
            raise TypeError(f"{_too_many(cls.__name__, values, first, fields)} {fixed}".rstrip())
        for name in options.keys() - fields.keys():
            known = [field for field in fields if field not in ("parent", "name")]
            new = next((new for new in _RENAMED.get(name, ()) if new in known), None)
            advice = cls.advice.get(name) or (f"Use {new}." if new else ADVICE.get(name))
            if name in ("axis_name", "momentum") and "norm" in fields:
                advice = _INSIDE
            hint = f" {advice}" if advice else did_you_mean(name, known)
            raise TypeError(f"{cls.__name__} has no option {name!r}.{hint} Its options: {', '.join(known)}.")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        """Check the attributes, and turn a pair of equal sizes into one."""
        for name, check, optional in checks_of(type(self)):
            value = getattr(self, name)
            if name in SIZES:
                value = one_number(name, value)
                setattr(self, name, value)
            if value is not None or not optional:
                check(**{name: value})
        super().__post_init__()


def _too_many(layer: str, values: Sequence[Any], first: Sequence[str], fields: Container[str]) -> str:
    """Return the error for values by position of which only the `first` are possible."""
    texts = [f"{value!r:.40}" for value in values]
    given, extra = f"{layer}({', '.join(texts)})", texts[len(first)]
    if not first:
        return f"{given}: no option can be given by position, as in {layer}(dtype=...). The input tells its channels."
    meant = [name for name in ("kernel_size", "strides") if name in fields and name not in first] or ["dtype"]
    calls = [f"{layer}({', '.join([*texts[: len(first)], f'{name}={extra}'])})" for name in meant]
    return f"{given}: only {' and '.join(first)} can be given by position. Write {' or '.join(calls)}."


def one_number(name: str, value: Any) -> Any:
    """Return the number that a pair holds twice, or any other value as it is.

    Raises:
        ValueError: The two differ.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return value
    if value[0] != value[1]:
        raise ValueError(
            f"{name}={value!r} must be the same for height and width: use {name}={value[0]!r} or {name}={value[1]!r}."
        )
    return value[0]


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype: Dtype) -> Any:
    """Return a parameter, as `module.param(name, init, shape, dtype)` does.

    Flax traces the initialiser of a parameter that exists too, to compare the shapes. That is half the trace of a network.
    """
    if module.has_variable("params", name):
        existing = module.get_variable("params", name)
        if isinstance(existing, jax.Array | np.ndarray) and existing.shape == shape:
            return existing
    return module.param(name, init, shape, dtype)


def inherited(module: nn.Module, name: str, default: _Value) -> _Value:
    """Return the attribute of a layer, or of the nearest layer around it that has a value, or the default."""
    around: Any = module
    while isinstance(around, nn.Module):
        if isinstance(around, Layer) and (value := getattr(around, name)) is not None:
            return value
        around = around.parent
    return default
