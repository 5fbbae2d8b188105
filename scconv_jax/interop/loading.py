"""Loads networks and weights from files of any format and key convention.

    model, variables = scconv_jax.load_model("scnet50-dc6a7e87.pth")

`conventions.py` identifies the key convention of a file, `recognition.py` the network.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from scconv_jax.fusion.fuse import difference, fused_like, is_fused
from scconv_jax.interop.checkpoint import Checkpoint, fitting, open_checkpoint
from scconv_jax.interop.conversion import Conversion, Variables, convert, covers, shapes
from scconv_jax.interop.keys import ConversionError, Rename, is_counter, matches
from scconv_jax.interop.recognition import beside, fit_input, head, options_from_entries, recognise, template
from scconv_jax.layers.core import Dense
from scconv_jax.messages import listed
from scconv_jax.models.registry import MODELS, create_model
from scconv_jax.weights import WeightsError

_log = logging.getLogger("scconv_jax")


def load_model(
    source: str | os.PathLike[str], model: str | None = None, *, key: str = "", checkpoint: str | int = "best", **options: Any
) -> tuple[nn.Module, Variables]:
    """Return a network and its variables, with the weights of a file.

    Args:
        source: A file (`.pth`, `.pt` or `.ckpt` of PyTorch, `.safetensors` with PyTorch's keys or ours), the index of a model in
            several files, a folder of the Hugging Face hub or of a training run, the name of a published checkpoint (`scnet50`),
            or an http or https address.
        model: Name of the network. If None, it is recognised from the file.
        key: Which weights to take from a file that has several sets: `state_dict_ema`, or the prefix of their keys, `ema_model`.
            If empty, the only ones, or the moving average if there is one.
        checkpoint: Which checkpoint of a run's folder to take: "best" (highest test accuracy; the latest if none was tested),
            "latest", or a step.
        **options: Options of `create_model`. By default they come from the file. If `num_classes` differs from the file's, the
            head is initialised; with `num_classes=0` it is left out. For other `in_channels` than 3, the first kernels are summed
            or repeated. The paper's ScConv has the same entries as the public code of 2023-10, which is assumed: give
            `variant="paper"` for the paper's.

    Returns:
        `(model, variables)`, for `model.apply(variables, images, train=False)`; variables are NumPy arrays, float32 or the option
        `param_dtype`. Notes for the user (see `load_weights`) are logged as warnings under `scconv_jax`.

    Raises:
        WeightsError: The file cannot be read or downloaded.
        ConversionError: The file fits no network here, or a network other than `model`.
        ValueError: There is no such network or option.
    """
    loaded = build_model(open_checkpoint(source, key=key, checkpoint=checkpoint), model, options, fused=True)
    for note in loaded.notes:
        _log.warning("%s: %s", loaded.checkpoint.source.path.name, note)
    return loaded.module or create_model(loaded.name, **loaded.options), loaded.variables


def load_weights(
    source: str | os.PathLike[str],
    template: Mapping[str, Any],
    *,
    key: str = "",
    checkpoint: str | int = "best",
    ignore: Sequence[str] = (),
    rename: Sequence[Rename] = (),
) -> tuple[Variables, list[str]]:
    """Fill variables from a file of weights, for example to fine-tune. If the head does not fit, it is left out.

    Args:
        source: As for `load_model`.
        template: Initial variables of a network or a layer, or only their shapes.
        key: As for `load_model`.
        checkpoint: As for `load_model`.
        ignore: As for `from_torch`; leaves with such keys keep the template's values.
        rename: As for `from_torch`, applied to the file's keys before their prefix and key convention are recognised.

    Returns:
        `(variables, notes)`. Variables have the structure, shapes and dtypes of `template`, NumPy arrays. If the file has another
        number of classes, or no head, the head keeps the template's values (it is initialised if there are only shapes). Notes
        are sentences for the user about the choice between several sets of weights, a prefix of all keys, a head that was left
        out, entries beside the network, values that are not finite, a change of dtype, or a difference that keys do not show.

    Raises:
        WeightsError: The file cannot be read or downloaded.
        ConversionError: Any other difference between file and template; the message lists all.
    """
    opened = open_checkpoint(source, key=key, checkpoint=checkpoint, rename=rename, ignore=ignore)
    loaded = convert_checkpoint(opened, template)
    return loaded.variables, loaded.notes


class LoadedWeights(NamedTuple):
    """Variables from a checkpoint, what happened to each entry, notes for the user, and the network if it is one of ours."""

    variables: Variables
    conversion: Conversion
    notes: list[str]
    checkpoint: Checkpoint  # without the prefix of its keys, and without entries beside the network
    name: str = ""
    options: Mapping[str, Any] = MappingProxyType({})
    module: nn.Module | None = None  # the network, if the file's variables are fused


def build_model(checkpoint: Checkpoint, model: str | None, options: Mapping[str, Any], *, fused: bool = False) -> LoadedWeights:
    """Build a network with the weights of an open checkpoint. `model` and `options` take precedence over the file's.

    If `fused`, files of fused variables are accepted.
    """
    path, expected = checkpoint.source.path, None
    named = checkpoint.source.metadata.get("model")
    if fused and checkpoint.source.is_flax and is_fused(checkpoint.source.variables):
        return _build_fused(checkpoint, model or named, options)
    if model is not None:

        def network(variant: Checkpoint) -> dict[str, Any]:
            return {**(options_from_entries(model, variant.arrays) if model in MODELS else {}), **options}

        checkpoint, _ = fitting(checkpoint, lambda variant: _covers(variant, template(create_model(model, **network(variant)))))
        name, options = model, network(checkpoint)
    elif named in MODELS:
        name, options = named, {**_options_in_metadata(checkpoint, named), **options}
    else:
        checkpoint, recognised = fitting(checkpoint, lambda variant: recognise(variant.weights))
        if recognised is None:
            unreadable = listed([f"{key} is {kind}" for key, kind in checkpoint.unreadable.items()], 3)
            raise ConversionError(
                f"No model here has the keys and shapes of {path} (key convention: {checkpoint.convention.description}"
                f"{unreadable and '; not read: '}{unreadable}). To see how it differs from a model, name that model; for a "
                "network or layer of your own, use from_torch with its variables, or `convert --model any`."
            )
        if options.items() <= recognised.options.items():
            expected = recognised.template
        name, options = recognised.model, {**recognised.options, **options}
    module, notes = create_model(name, **options), []
    if options.get("num_classes") == 0 and f"{MODELS[name].classifier}.weight" in checkpoint.arrays:
        checkpoint = checkpoint._replace(ignore=(*checkpoint.ignore, f"{MODELS[name].classifier}.*"))
        notes.append(f"num_classes=0: the file's head, {MODELS[name].classifier}, was left out.")
    try:
        loaded = convert_checkpoint(checkpoint, expected or template(module))
        return loaded._replace(name=name, options=options, notes=[*notes, *loaded.notes])
    except ConversionError:
        _, other = fitting(checkpoint, lambda variant: recognise(variant.weights))
        if other is None or other.model == name:
            raise
        raise ConversionError(
            f"{path} does not fit {name}: it looks like {other.model}, which has every key and shape in it. "
            f"Give {other.model} as the model, or leave it out."
        ) from None


def _build_fused(checkpoint: Checkpoint, name: str | None, options: Mapping[str, Any]) -> LoadedWeights:
    source = checkpoint.source
    if name not in MODELS:
        raise ConversionError(
            f"{source.path} holds fused variables, which do not show their network. Give its name as the model, or save them "
            'with the metadata {"model": NAME, "arguments": {...}}.'
        )
    options = {**_options_in_metadata(checkpoint, name), **options}
    module, expected = fused_like(create_model(name, **options), traverse_util.flatten_dict(source.variables))
    if problem := difference(expected, source.variables):
        raise ConversionError(f"{source.path} does not fit {name} in its fused form. {problem}")
    conversion = Conversion(source.variables, list(checkpoint.arrays), [], [], [])
    return LoadedWeights(source.variables, conversion, checkpoint.notes, checkpoint, name, options, module)


def _options_in_metadata(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return the network's options from the file's metadata, after checking that they are valid."""
    options = json.loads(checkpoint.source.metadata.get("arguments", "{}"))
    description = f"{name} with {json.dumps(options):.200}"
    options.pop("fused", None)  # the leaves tell
    headless = {"num_classes": 0} if options.pop("num_classes", None) == 0 else {}
    options |= headless | {  # a file cannot ask for a head that it does not have
        key: value
        for key, value in options_from_entries(name, checkpoint.arrays).items()
        if key in ("num_classes", "in_channels")
    }
    try:
        if options.get("depth", 0) + sum(options.get("block_sizes", [])) > len(checkpoint.arrays):  # tracing would never end
            raise ValueError("it has more layers than the file has entries")
        template(create_model(name, **options))
    except Exception as error:  # options from a file can fail in any way
        raise WeightsError(
            f"{checkpoint.source.path} claims to be {description}, which cannot be built: {error!s:.300}"
        ) from error
    return options


def convert_checkpoint(checkpoint: Checkpoint, template: Mapping[str, Any]) -> LoadedWeights:
    """Convert an open checkpoint to variables like `template`, as `load_weights` does."""
    if checkpoint.source.is_flax and is_fused(checkpoint.source.variables):
        raise ConversionError(
            f"{checkpoint.source.path} holds fused variables, which only load_model and load_run accept. Use the file of the "
            "network before scconv_jax.fuse."
        )
    checkpoint, complete = fitting(checkpoint, lambda variant: _covers(variant, template))
    expected, others = shapes(template), {}
    if complete:
        keys = beside(checkpoint.weights, expected)
        others = {key: value for key, value in checkpoint.arrays.items() if key in keys and ("." in key or not is_counter(key))}
        checkpoint = checkpoint.without(others)
    arrays, notes = checkpoint.arrays, checkpoint.notes
    numbers = {key: value.dtype for key, value in arrays.items() if not is_counter(key) and not matches(key, checkpoint.ignore)}
    if wrong := [f"{key} ({dtype})" for key, dtype in numbers.items() if not jnp.issubdtype(dtype, jnp.floating)]:
        raise ConversionError(
            f"Weights must be floating-point; these are not: {listed(wrong, 3)}. Quantised weights cannot be converted."
        )
    wanted = expected.keys() - arrays.keys()
    if unreadable := [f"{key} is {kind}" for key, kind in checkpoint.unreadable.items() if key in wanted]:
        raise ConversionError(
            f"Weights must be dense floating-point tensors; these are not: {listed(unreadable, 3)}. Save them as dense ones."
        )
    arrays, note = fit_input(arrays, template)
    notes += [note] if note else []
    ignore = list(checkpoint.ignore)
    if name := head(template):
        kernel = template["params"][name]["kernel"]
        if note := _head_difference(arrays, others, name, kernel.shape[::-1]):
            ignore.append(f"{name}.*")
            notes.append(note)
            if isinstance(kernel, jax.ShapeDtypeStruct):
                inputs, classes = kernel.shape
                initial = Dense(classes).init(jax.random.key(0), jnp.zeros((1, inputs)))["params"]
                template = {**template, "params": {**template["params"], name: initial}}
    conversion = convert(arrays, template, ignore=ignore)
    if kept := [key for key in conversion.kept if matches(key, checkpoint.ignore)]:
        notes.append(f"Ignored as asked, so that the network keeps its initial values: {listed(kept, 5)}.")
    changes: dict[str, int] = {}
    variables = jax.tree.map(lambda value, like: _cast(value, like.dtype, changes), conversion.variables, dict(template))
    notes += [f"{count} entries were converted from {change}." for change, count in changes.items()]
    if not_finite := {key: n for key, n in checkpoint.source.not_finite.items() if key not in checkpoint.outside}:
        notes.append(f"{sum(not_finite.values())} values are NaN or infinite, in {listed(list(not_finite), 3)}. They are kept.")
    return LoadedWeights(variables, conversion, notes, checkpoint)


def _covers(checkpoint: Checkpoint, template: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has every entry of a template but perhaps the head's, whatever their shapes."""
    name = head(template)
    return covers(checkpoint.arrays, template, [*checkpoint.ignore, *([f"{name}.*"] if name else [])])


def _head_difference(arrays: Mapping[str, Any], others: Mapping[str, Any], name: str, shape: tuple[int, int]) -> str:
    """Return a note if the file has another number of classes or no head, perhaps one among the others; else an empty string."""
    weight = arrays.get(f"{name}.weight")
    if weight is None and f"{name}.bias" not in arrays:
        like = [key for key, shaped in others.items() if key.endswith(".weight") and shaped.shape[1:] == shape[1:]]
        hint = f" If it is {like[0]}, rename that to {name}.weight." if like else ""
        return f"The file has no head: {name}, of {shape[0]} classes, keeps its initial values.{hint}"
    if weight is not None and weight.shape != shape and weight.shape[1:] == shape[1:]:
        return f"The file's head has {weight.shape[0]} classes, the network {shape[0]}: {name} keeps its initial values."
    return ""


def _cast(value: Any, dtype: Any, changes: dict[str, int]) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if np.isfinite(value).sum() != np.isfinite(result).sum():
        raise ConversionError(f"Some values are beyond the range of {np.dtype(dtype)}, the dtype of parameters here.")
    change = f"{value.dtype} to {np.dtype(dtype)}"
    changes[change] = changes.get(change, 0) + 1
    return result
