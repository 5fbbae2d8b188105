"""Loads networks and weights from files of any format and key convention.

    model, variables = scconv_jax.load_model("scnet50-dc6a7e87.pth")

`conventions.py` identifies the key convention of a file, `recognition.py` the network.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scconv_jax.interop import conventions
from scconv_jax.interop.conversion import (
    Conversion,
    ConversionError,
    Rename,
    Variables,
    convert,
    is_counter,
    matches,
    rename_keys,
    to_arrays,
    to_torch,
)
from scconv_jax.interop.recognition import fit_input, head, options_from_entries, recognise, template
from scconv_jax.layers.core import Dense
from scconv_jax.messages import listed
from scconv_jax.models.registry import MODELS, PUBLISHED, create_model
from scconv_jax.weights import Source, WeightsError, read
from scconv_jax.weights.download import fetch

_log = logging.getLogger("scconv_jax")


def load_model(source: str | os.PathLike[str], model: str | None = None, **options: Any) -> tuple[nn.Module, Variables]:
    """Make a network with the weights of a file.

    Args:
        source: A file (`.pth` or `.pt` of PyTorch, `.safetensors` with PyTorch's keys or ours), the folder of a training run, the
            name of a published checkpoint (`scnet50`), or an http or https address.
        model: Name of the network. If None, it is recognised from the file.
        **options: Options of `create_model`. By default they come from the file. If `num_classes` differs from the
            file's, the head is initialised; for other `in_channels` than 3, the first kernels are summed or repeated. The paper's
            ScConv has the same entries as the public code of 2023-10, which is assumed: give `variant="paper"` for the paper's.

    Returns:
        `(model, variables)`, for `model.apply(variables, images, train=False)`; variables are NumPy arrays, float32. Notes for
        the user (see `load_weights`) are logged as warnings under `scconv_jax`.

    Raises:
        WeightsError: The file cannot be read or downloaded.
        ConversionError: The file fits no network here, or a network other than `model`.
        ValueError: There is no such network or option.
    """
    checkpoint = open_checkpoint(source)
    loaded = build_model(checkpoint, model, options)
    for note in loaded.notes:
        _log.warning("%s: %s", checkpoint.source.path.name, note)
    return create_model(loaded.name, **loaded.options), loaded.variables


def load_weights(
    source: str | os.PathLike[str],
    template: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    rename: Sequence[Rename] = (),
) -> tuple[Variables, list[str]]:
    """Fill variables from a file of weights, for example to fine-tune. If the head does not fit, it is left out.

    Args:
        source: As for `load_model`.
        template: Initial variables of a network or a layer, or only their shapes.
        ignore: As for `from_torch`; leaves with such keys keep the template's values.
        rename: As for `from_torch`, applied after the renaming of the file's key convention.

    Returns:
        `(variables, notes)`. Variables have the structure, shapes and dtypes of `template`, NumPy arrays. If the file has another
        number of classes, or no head, the head keeps the template's values (it is initialised if there are only shapes). Notes
        are sentences for the user about a head that was left out, values that are not finite, a change of dtype, or a difference
        that keys do not show.

    Raises:
        WeightsError: The file cannot be read or downloaded.
        ConversionError: Any other difference between file and template; the message lists all.
    """
    loaded = convert_checkpoint(open_checkpoint(source, rename=rename, ignore=ignore), template)
    return loaded.variables, loaded.notes


class Checkpoint(NamedTuple):
    """A source of weights, its entries under our keys."""

    arrays: dict[str, np.ndarray]
    original: dict[str, np.ndarray]  # the entries under their own keys, without prefixes such as `module.`
    convention: conventions.KeyConvention
    source: Source
    ignore: tuple[str, ...]  # patterns of entries to skip: the convention's and the user's

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The entries without those to skip."""
        return {key: value for key, value in self.arrays.items() if not matches(key, self.ignore)}


class LoadedWeights(NamedTuple):
    """Variables from a checkpoint, what happened to each entry, notes for the user, and the network if it is one of ours."""

    variables: Variables
    conversion: Conversion
    notes: list[str]
    name: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


def open_checkpoint(
    source: str | os.PathLike[str], *, convention: str | None = None, rename: Sequence[Rename] = (), ignore: Sequence[str] = ()
) -> Checkpoint:
    """Read a source; a name or an address is downloaded first. `convention` overrides the identified one."""
    path, text = Path(source), str(source)
    if "://" in text or (re.fullmatch(r"\w[\w-]*", text) and not os.path.lexists(path)):  # a name, perhaps misspelt
        path = fetch(text, published=PUBLISHED)
        try:
            contents = read(path)
        except WeightsError:
            path.unlink(missing_ok=True)  # perhaps a server's error page: the next call downloads again
            raise
    else:
        contents = read(path)
    if contents.is_flax:
        original, found = to_torch(contents.variables), conventions.FLAX
    else:
        original = to_arrays(contents.tensors)
        found = conventions.identify(original) if convention is None else conventions.by_name(convention)
    arrays = rename_keys(original, (*found.rename, *rename))
    for key in found.linear:
        if key in arrays and arrays[key].shape[2:] == (1, 1):
            arrays[key] = arrays[key][:, :, 0, 0]
    return Checkpoint(arrays, original, found, contents, (*found.ignore, *ignore))


def build_model(checkpoint: Checkpoint, model: str | None, options: Mapping[str, Any]) -> LoadedWeights:
    """Build a network with the weights of an open checkpoint. `model` and `options` take precedence over the file's."""
    path, shapes = checkpoint.source.path, None
    named = checkpoint.source.metadata.get("model")
    if model is not None:
        name, options = model, {**(options_from_entries(model, checkpoint.arrays) if model in MODELS else {}), **options}
    elif named in MODELS:
        name, options = named, {**_options_in_metadata(checkpoint, named), **options}
    elif recognised := recognise(checkpoint.weights):
        if options.items() <= recognised.options.items():
            shapes = recognised.template
        name, options = recognised.model, {**recognised.options, **options}
    else:
        raise ConversionError(
            f"No model here has the keys and shapes of {path} (key convention: {checkpoint.convention.description}). To see how "
            "it differs from a model, name that model; for a network or layer of your own, use from_torch with its variables, or "
            "`convert --model any`."
        )
    module = create_model(name, **options)
    try:
        return convert_checkpoint(checkpoint, shapes or template(module))._replace(name=name, options=options)
    except ConversionError:
        other = recognise(checkpoint.weights)
        if other is None or other.model == name:
            raise
        raise ConversionError(
            f"{path} does not fit {name}: it looks like {other.model}, which has every key and shape in it. "
            f"Give {other.model} as the model, or leave it out."
        ) from None


def _options_in_metadata(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return the network's options from the file's metadata, after checking that they are valid."""
    options = json.loads(checkpoint.source.metadata.get("arguments", "{}"))
    description = f"{name} with {json.dumps(options):.200}"
    options.pop("num_classes", None)  # a file cannot ask for a head that it does not have
    options |= {
        key: value
        for key, value in options_from_entries(name, checkpoint.arrays).items()
        if key in ("num_classes", "in_channels")
    }
    try:
        if options.get("depth", 0) > len(checkpoint.arrays):  # to trace such a network would never end
            raise ValueError("it has more layers than the file has entries")
        template(create_model(name, **options))
    except Exception as error:  # options from a file can fail in any way
        raise WeightsError(
            f"{checkpoint.source.path} claims to be {description}, which cannot be built: {error!s:.300}"
        ) from error
    return options


def convert_checkpoint(checkpoint: Checkpoint, template: Mapping[str, Any]) -> LoadedWeights:
    """Convert an open checkpoint to variables like `template`, as `load_weights` does."""
    arrays = checkpoint.arrays
    numbers = {key: value.dtype for key, value in arrays.items() if not is_counter(key)}
    if wrong := [f"{key} ({dtype})" for key, dtype in numbers.items() if not jnp.issubdtype(dtype, jnp.floating)]:
        raise ConversionError(
            f"Weights must be floating-point; these are not: {listed(wrong, 3)}. Quantised weights cannot be converted."
        )
    notes = [checkpoint.convention.caution] if checkpoint.convention.caution else []
    arrays, note = fit_input(arrays, template)
    notes += [note] if note else []
    ignore = list(checkpoint.ignore)
    if name := head(template):
        kernel = template["params"][name]["kernel"]
        if note := _head_difference(arrays, name, kernel.shape[::-1]):
            ignore.append(f"{name}.*")
            notes.append(note)
            if isinstance(kernel, jax.ShapeDtypeStruct):
                inputs, classes = kernel.shape
                initial = Dense(classes).init(jax.random.key(0), jnp.zeros((1, inputs)))["params"]
                template = {**template, "params": {**template["params"], name: initial}}
    conversion = convert(arrays, template, ignore=ignore)
    changes: dict[str, int] = {}
    variables = jax.tree.map(lambda value, like: _cast(value, like.dtype, changes), conversion.variables, dict(template))
    notes += [f"{count} entries were converted from {change}." for change, count in changes.items()]
    if not_finite := checkpoint.source.not_finite:
        notes.append(f"{sum(not_finite.values())} values are NaN or infinite, in {listed(list(not_finite), 3)}. They are kept.")
    return LoadedWeights(variables, conversion, notes)


def _head_difference(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, int]) -> str:
    """Return a note if the file has another number of classes or no head; else an empty string."""
    weight = arrays.get(f"{name}.weight")
    if weight is None and f"{name}.bias" not in arrays:
        return f"The file has no head: {name}, of {shape[0]} classes, keeps its initial values."
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
