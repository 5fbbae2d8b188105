"""Which network a checkpoint is of: by comparing its names and shapes with the networks' own, not by rules for each.

Residual networks are told by a part first, the number of blocks of each stage, then by stem and first block. Only one that agrees
so far is looked at whole, and the blocks of a stage after its first, being alike, are traced once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.interop.conventions import scconv_options
from scconv_jax.interop.conversion import ConversionError, is_counter, shapes
from scconv_jax.models.registry import MODELS, create_model, options_of
from scconv_jax.models.resnet import ResNet

SIZE = 128  # pixels; every network takes such images


class Recognised(NamedTuple):
    """A network by name, and the options with which its entries are those of the checkpoint."""

    model: str
    options: dict[str, Any]


def template(model: nn.Module) -> dict[str, Any]:
    """Return the shapes and dtypes of a network's variables, as `jax.eval_shape(model.init, ...)` does, only sooner."""
    if not isinstance(model, ResNet) or max(model.stage_sizes) <= 2:
        return _traced(model)
    variables = _traced(model.clone(stage_sizes=tuple(min(size, 2) for size in model.stage_sizes)))
    for collection in variables.values():
        for i, size in enumerate(model.stage_sizes):
            stage = collection[f"layer{i + 1}"]
            stage |= {str(block): stage["1"] for block in range(2, size)}
    return variables


def head(template: Mapping[str, Any]) -> str | None:
    """Return the name of a network's head, the one dense layer at the top of its variables; None where there is no such."""
    modules = {name: leaves for name, leaves in template["params"].items() if isinstance(leaves, Mapping)}
    dense = [name for name, leaves in modules.items() if len(getattr(leaves.get("kernel"), "shape", ())) == 2]
    return dense[0] if len(dense) == 1 else None


def template_from_entries(entries: Mapping[str, Any], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Return the variables' shapes of a Flax network that has modules of the checkpoint's names, whatever it computes.

    Args:
        entries: name to array, or to what has its shape.
        ignore: patterns of names to leave out.

    Returns:
        A template: kernels of 2-D and 4-D weights, scales of vectors called weight, biases, γ and β, running statistics.

    Raises:
        ConversionError: for an entry of another kind.
    """
    tree: dict[str, Any] = {"params": {}}
    for name, value in entries.items():
        if is_counter(name) or any(fnmatchcase(name, pattern) for pattern in ignore):
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
                f"Entry {name} of shape {shape} is of no kind that can be converted without a network: there are 2-D and 4-D "
                "weights, and vectors called weight, bias, gamma, beta, running_mean, running_var. Pass over it by --ignore."
            )
        node = tree.setdefault("batch_stats" if kind.startswith("running") else "params", {})
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


_LEAVES = {"weight": "scale", "bias": "bias", "gamma": "gamma", "beta": "beta", "running_mean": "mean", "running_var": "var"}


def options_shown(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of the network called `name` that show in a checkpoint: number of classes, ScConv's α and version."""
    dense = [value for value in entries.values() if len(value.shape) == 2]
    shown = scconv_options(entries) | ({"num_classes": dense[-1].shape[0]} if dense else {})
    return {option: value for option, value in shown.items() if option in options_of(name)}


def recognise(entries: Mapping[str, Any]) -> Recognised | None:
    """Say which network a checkpoint is of.

    Args:
        entries: name, in our naming, to array, or to what has its shape; nothing but the weights.

    Returns:
        The network, with the options that show in its entries: `num_classes`, and ScConv's `alpha` and `variant`. None if it is
        none of `list_models()`. Output strides do not show.
    """
    found = {name: tuple(value.shape) for name, value in entries.items() if not is_counter(name)}
    dense = [name for name, shape in found.items() if len(shape) == 2]
    blocks = _blocks(found)
    for name in MODELS:
        options = options_shown(name, entries)
        try:
            model = create_model(name, **options)
        except ValueError:  # α of a file that is no network of ours
            continue
        if isinstance(model, ResNet):
            if model.stage_sizes != blocks or not _begins(model, found):
                continue
        elif blocks:
            continue
        if _without_head(shapes(template(model)), dense) == _without_head(found, dense):
            return Recognised(name, options)
    return None


def _traced(model: nn.Module) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def _blocks(names: Mapping[str, Any]) -> tuple[int, ...]:
    """Number of blocks of each stage."""
    numbers = {(int(found[1]), int(found[2])) for name in names if (found := re.match(r"layer(\d+)\.(\d+)\.", name))}
    return tuple(sum(stage == i for stage, _ in numbers) for i in sorted({stage for stage, _ in numbers}))


def _begins(model: ResNet, found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether stem and first block are those of the network."""
    first = model.clone(stage_sizes=(1,), planes=model.planes[:1], output_stride=model.stem_stride)
    wanted = {name: shape for name, shape in shapes(_traced(first)).items() if len(shape) != 2 and name != "fc.bias"}
    return {name: shape for name, shape in found.items() if name.startswith(("conv1.", "bn1.", "layer1.0."))} == wanted


def _without_head(found: Mapping[str, tuple[int, ...]], dense: list[str]) -> dict[str, tuple[int, ...]]:
    """Leave out the head where the checkpoint has none."""
    if dense:
        return dict(found)
    heads = {name.removesuffix("weight") for name, shape in found.items() if len(shape) == 2}
    return {name: shape for name, shape in found.items() if not name.startswith(tuple(heads) or ("\0",))}
