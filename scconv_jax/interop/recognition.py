"""Recognises the network of a checkpoint by comparing its keys and shapes with those of every network.

Tracing every network is slow. Residual networks are therefore compared step by step: the number of blocks of each stage, then
the stem and the first block, then the whole network. All blocks of a stage after the first are alike and are traced once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from scconv_jax.interop.conventions import scconv_options
from scconv_jax.interop.conversion import shapes
from scconv_jax.interop.keys import ConversionError, is_counter, matches
from scconv_jax.models.complexity import shorten
from scconv_jax.models.registry import MODELS, create_model

STEMS = ("conv1.weight", "conv1.0.weight", "conv_stem.weight")  # kernels that the images meet
SIZE = 128  # pixels; every network accepts such images


class Recognised(NamedTuple):
    """A network's name, the options that fit the checkpoint's keys and shapes, and the shapes of its variables."""

    model: str
    options: dict[str, Any]
    template: dict[str, Any]


def template(model: nn.Module) -> dict[str, Any]:
    """Return the shapes and dtypes of a network's variables, like `jax.eval_shape(model.init, ...)` but faster."""
    return _template(model)


@lru_cache(maxsize=64)
def _template(model: Any) -> dict[str, Any]:
    short, sizes = shorten(model)
    variables = _traced(short)
    for collection in variables.values():
        for name, size in sizes.items():
            collection[name] |= {str(block): collection[name]["1"] for block in range(2, size)}
    return variables


def head(template: Mapping[str, Any]) -> str | None:
    """Return the name of the only linear layer at the top level of a template, or None if there is none or more than one."""
    modules = {name: leaves for name, leaves in template["params"].items() if isinstance(leaves, Mapping)}
    dense = [name for name, leaves in modules.items() if len(getattr(leaves.get("kernel"), "shape", ())) == 2]
    return dense[0] if len(dense) == 1 else None


def template_from_entries(entries: Mapping[str, Any], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Return a template for a checkpoint of an unknown network, from its keys and shapes alone.

    Args:
        entries: Arrays, or objects with a shape, by state-dict key.
        ignore: Patterns of keys to skip.

    Returns:
        The template. 2-D and 4-D weights become kernels, 1-D weights become scales; biases, γ, β and running statistics keep
        their kind.

    Raises:
        ConversionError: An entry is of another kind.
    """
    leaves: dict[tuple[str, ...], jax.ShapeDtypeStruct] = {}
    for name, value in entries.items():
        if is_counter(name) or matches(name, ignore):
            continue
        *modules, kind = name.split(".")
        shape = tuple(value.shape)
        if kind == "weight" and len(shape) in (2, 4):
            leaf, shape = "kernel", (*shape[2:], shape[1], shape[0])
        else:
            vector = bool(shape) and math.prod(shape) == shape[0]
            leaf = _LEAVES.get(kind, "") if vector else ""
        if not leaf:
            raise ConversionError(
                f"Entry {name} of shape {shape} cannot be converted without a network. Supported are 2-D and 4-D weights, and "
                "vectors called weight, bias, gamma, beta, running_mean or running_var. Skip the entry with --ignore."
            )
        collection = "batch_stats" if kind.startswith("running") else "params"
        leaves[collection, *modules, leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"params": {}, **unflatten_dict(leaves)}


_LEAVES = {"weight": "scale", "bias": "bias", "gamma": "gamma", "beta": "beta", "running_mean": "mean", "running_var": "var"}


def options_from_entries(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a checkpoint determines: `num_classes`, `in_channels` unless 3, `alpha` and `variant` of ScConv."""
    spec = MODELS[name]
    shown = scconv_options(entries)
    weight = entries.get(f"{spec.classifier}.weight")
    if weight is not None and len(weight.shape) == 2:
        shown["num_classes"] = weight.shape[0]
    stem = next((entries[key] for key in STEMS if key in entries), None)
    if stem is not None and len(stem.shape) == 4 and stem.shape[1] != 3:
        shown["in_channels"] = stem.shape[1]
    return {option: value for option, value in shown.items() if option in spec.options}


def fit_input(arrays: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """Return entries whose first kernel has the template's input channels, and a note if it had three others.

    For one channel, kernels for three are summed: a grey image repeated to RGB gives the same result. For others, they are
    repeated and scaled by 3 / channels. This is timm's rule (`adapt_input_conv`).
    """
    wanted = shapes(template)
    for key in STEMS:
        shape, kernel = wanted.get(key, ()), arrays.get(key)
        if kernel is None or len(shape) != 4 or shape[1] == 3 or kernel.shape != (shape[0], 3, *shape[2:]):
            continue
        channels, wide = shape[1], kernel.astype(np.float32)
        if channels == 1:
            wide, how = wide.sum(axis=1, keepdims=True), "summed"
        else:
            wide = np.take(wide, np.arange(channels) % 3, axis=1) * np.float32(3 / channels)
            how = f"repeated and scaled by 3/{channels}"
        note = f"The file's {key} has 3 input channels, the network {channels}: the kernels were {how}."
        return {**arrays, key: wide.astype(kernel.dtype)}, note
    return dict(arrays), ""


def recognise(entries: Mapping[str, Any]) -> Recognised | None:
    """Return the network of a checkpoint, or None if no network in `list_models()` fits.

    Args:
        entries: Arrays, or objects with a shape, by our keys; weights only.

    Returns:
        The network with the options that the checkpoint determines (`options_from_entries`). The output stride is not among them.
        Entries beside the network's modules play no part.
    """
    found = {name: tuple(value.shape) for name, value in entries.items() if not is_counter(name)}
    blocks = _blocks(found)
    # Tracing all networks takes seconds. Each has a norm at its top, and those without stages have more than 100 entries.
    if not any(re.fullmatch(r"[^.]+\.running_mean", key) for key in found) or (not blocks and len(found) <= 100):
        return None
    for name, spec in MODELS.items():
        options = options_from_entries(name, entries)
        try:
            model = create_model(name, **options)
        except ValueError:  # an α that no network can have
            continue
        headless = f"{spec.classifier}." if f"{spec.classifier}.weight" not in found else None
        if _stage_sizes(model) != blocks or (blocks and not _has_stem_and_first_block(model, found, f"{spec.classifier}.")):
            continue
        variables = template(model)
        expected = shapes(variables)
        # An unknown entry in a module of the network makes another network; one beside its modules does not.
        others = beside(found, expected)
        if _without(headless, expected) == {key: shape for key, shape in found.items() if key not in others}:
            return Recognised(name, options, variables)
    return None


def beside(entries: Iterable[str], expected: Iterable[str]) -> set[str]:
    """Return the entries that are in none of a network's modules, such as a loss's or a copy's."""
    modules = {key.partition(".")[0] for key in expected}
    return {key for key in entries if key.partition(".")[0] not in modules}


def _stage_sizes(model: Any) -> tuple[int, ...]:
    """Return the number of blocks of each stage of a residual network; empty for other networks."""
    return getattr(model, "stage_sizes", ())


def _traced(model: nn.Module) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, getattr(model, "in_channels", 3)), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.eval_shape(jax.random.key, 0), images)  # starts no backend


def _blocks(names: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the number of blocks of each stage of a checkpoint."""
    numbers = {(int(found[1]), int(found[2])) for name in names if (found := re.match(r"layer(\d+)\.(\d+)\.", name))}
    return tuple(sum(stage == i for stage, _ in numbers) for i in sorted({stage for stage, _ in numbers}))


def _has_stem_and_first_block(model: Any, found: Mapping[str, tuple[int, ...]], head: str) -> bool:
    """Return whether a checkpoint has the stem and the first block of a residual network."""
    first = model.clone(stage_sizes=(1,), planes=model.planes[:1], output_stride=model.stem_stride)
    start = {name: shape for name, shape in found.items() if name.startswith(("conv1.", "bn1.", "layer1.0."))}
    return _without(head, shapes(_traced(first))) == start


def _without(prefix: str | None, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in found.items() if prefix is None or not name.startswith(prefix)}
