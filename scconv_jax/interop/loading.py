"""Networks and their weights from files, whatever the naming and format: from a checkpoint to a model in one line.

    model, variables = scconv_jax.load_model("scnet50-dc6a7e87.pth")

Whose names a file has (`naming.py`) and which network it is of (`recognise.py`) is found out, and said.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scconv_jax.interop import conventions as naming
from scconv_jax.interop.conversion import ConversionError, Match, Rename, Variables, is_counter, match, normalised, to_torch
from scconv_jax.interop.recognition import head, options_shown, recognise, template
from scconv_jax.layers.core import Dense
from scconv_jax.models.registry import MODELS, PUBLISHED, create_model
from scconv_jax.weights import Source, WeightsError, read
from scconv_jax.weights.download import fetch
from scconv_jax.weights.second_reader import Opinion, confirm

_log = logging.getLogger("scconv_jax")


def load_model(source: str | os.PathLike[str], model: str | None = None, **options: Any) -> tuple[nn.Module, Variables]:
    """Make the network that a file of weights is of, with these weights.

    Args:
        source: a file (`.pth` or `.pt` of PyTorch, `.safetensors` in PyTorch's naming or in ours), the folder of a training
            run, the name of a published checkpoint (`scnet50`), or an http or https address.
        model: name of the network, where it should not be recognised.
        **options: of `create_model`; where not given, what the file shows. With another `num_classes` than the file has, the
            head is drawn anew. ScConv of the paper and of the public code of 2023-10 have the same entries, and are taken
            for the latter: give `variant="paper"` for the former.

    Returns:
        `(model, variables)`, for `model.apply(variables, images, train=False)`; variables are NumPy arrays, float32. What a user
        should know (see `load_weights`) is logged as a warning under `scconv_jax`.

    Raises:
        WeightsError: the file cannot be read or fetched.
        ConversionError: it is of no network here, or of another than `model`.
        ValueError: a network or an option that does not exist.
    """
    found = open_entries(source)
    name, options = choose(found, model, options)
    network = create_model(name, **options)
    filled = fill_model(found, name, network)
    for note in filled.notes:
        _log.warning("%s: %s", found.source.path.name, note)
    return network, filled.variables


def load_weights(
    source: str | os.PathLike[str],
    template: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    rename: Sequence[Rename] = (),
) -> tuple[Variables, list[str]]:
    """Fill variables from a file of weights, all but the head if need be: what fine-tuning starts from.

    Args:
        source: as of `load_model`.
        template: the variables to fill, as initialised, or only their shapes; of a network, or of a layer alone.
        ignore: as of `from_torch`: what the network has under such names keeps the template's values.
        rename: as of `from_torch`, after the renaming that the file's naming asks for.

    Returns:
        `(variables, notes)`. Variables have the structure, shapes and dtypes of `template`, NumPy arrays. Where the file has
        another number of classes, or no head, the head keeps the template's values (drawn anew where there are only shapes).
        Notes are sentences for the user: a head not taken, values that are not finite, a change of dtype, what the file's
        names do not tell.

    Raises:
        WeightsError: the file cannot be read or fetched.
        ConversionError: any other difference between file and template; the message lists all.
    """
    filled = fill(open_entries(source, rename=rename, ignore=ignore), template)
    return filled.variables, filled.notes


class Entries(NamedTuple):
    """What a source holds, under the names that our networks' state dicts have."""

    arrays: dict[str, np.ndarray]
    naming: naming.Naming
    source: Source
    ignore: tuple[str, ...]  # patterns of entries to pass over: the naming's and the user's
    opinion: Opinion  # PyTorch's own, of a file of its formats


class Filled(NamedTuple):
    """Variables filled from a source, what became of each of its entries, and notes for the user."""

    variables: Variables
    match: Match
    notes: list[str]


def open_entries(
    source: str | os.PathLike[str], *, convention: str | None = None, rename: Sequence[Rename] = (), ignore: Sequence[str] = ()
) -> Entries:
    """Read a source, fetched first if it is a name or an address; `convention` forces the naming."""
    path, text = Path(source), str(source)
    if "://" in text or (re.fullmatch(r"\w[\w-]*", text) and not os.path.lexists(path)):  # a name, which may be misspelt
        read_source, opinion = _read_fetched(fetch(text, published=PUBLISHED))
    else:
        read_source, opinion = _read(path)
    if read_source.tensors is None:
        named, arrays = naming.FLAX, to_torch(read_source.variables or {})
    else:
        arrays = normalised(read_source.tensors)
        named = naming.recognise(arrays) if convention is None else naming.naming(convention)
    arrays = normalised(arrays, (*named.rename, *rename))
    for name in named.linear:
        if name in arrays and arrays[name].shape[2:] == (1, 1):
            arrays[name] = arrays[name][:, :, 0, 0]
    return Entries(arrays, named, read_source, (*named.ignore, *ignore), opinion)


def _read(path: Path) -> tuple[Source, Opinion]:
    source = read(path)
    return source, confirm(source)


def _read_fetched(path: Path) -> tuple[Source, Opinion]:
    """Read a file of the cache. One that cannot be used, a server's page of errors say, is not kept: the next call asks again."""
    try:
        return _read(path)
    except WeightsError:
        path.unlink(missing_ok=True)
        raise


def choose(found: Entries, model: str | None, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the network that a source is of, by name, and its options; those given win.

    Raises:
        ConversionError: if none is given, none is said in the file, and its entries are those of none.
    """
    said = found.source.metadata
    if model is None and said.get("model") in MODELS:
        arguments = json.loads(said.get("arguments", "{}"))
        said_to_be = f"{said['model']} with {json.dumps(arguments):.200}"
        arguments.pop("num_classes", None)  # a file cannot ask for a head that it does not have
        arguments |= {key: value for key, value in options_shown(said["model"], found.arrays).items() if key == "num_classes"}
        try:
            if arguments.get("depth", 0) > len(found.arrays):  # the only option that could make a network without end
                raise ValueError("its depth is more than the file has entries")
            template(create_model(said["model"], **arguments))
        except Exception as error:  # whatever options of a file, wrong in name or type, lead to
            raise WeightsError(
                f"{found.source.path} says that it is of {said_to_be}, which cannot be made: {error!s:.300}"
            ) from error
        return said["model"], {**arguments, **options}
    if model is not None:
        if model in MODELS:
            options = {**options_shown(model, found.arrays), **options}
        return model, dict(options)
    recognised = recognise(_weights(found))
    if recognised is None:
        raise ConversionError(
            f"{found.source.path} is of no network here: none has entries of these names and shapes. Its names are "
            f"{found.naming.description}. To see what differs from one, name it as the model; for a network or layer of your "
            "own, use from_torch with its variables, or `convert --model any`."
        )
    return recognised.model, {**recognised.options, **options}


def fill_model(found: Entries, name: str, model: nn.Module) -> Filled:
    """Fill the variables of a network called `name`; if another network is what fits, say which."""
    try:
        return fill(found, template(model))
    except ConversionError:
        other = recognise(_weights(found))
        if other is None or other.model == name:
            raise
        raise ConversionError(
            f"{found.source.path} is not of {name}: it looks like {other.model} (every name and shape is that network's). "
            f"Give {other.model} as the model, or leave it out."
        ) from None


def fill(found: Entries, template: Mapping[str, Any]) -> Filled:
    """Do what `load_weights` does with a source that was read."""
    _check_dtypes(found.arrays)
    notes = [found.naming.caution] if found.naming.caution else []
    ignore = list(found.ignore)
    if name := head(template):
        kernel = template["params"][name]["kernel"]
        difference = _head_difference(found.arrays, name, kernel.shape[::-1])
        if difference:
            ignore.append(f"{name}.*")
            template = {**template, "params": {**template["params"], name: _values(template["params"][name])}}
            notes.append(difference)
    matched = match(found.arrays, template, ignore=ignore)
    changes: dict[str, int] = {}
    variables = jax.tree.map(lambda value, like: _cast(value, like.dtype, changes), matched.variables, dict(template))
    notes += [f"{count} entries were {change}." for change, count in changes.items()]
    if not_finite := found.source.not_finite:
        listed = ", ".join(list(not_finite)[:3]) + (", ..." if len(not_finite) > 3 else "")
        notes.append(f"{sum(not_finite.values())} values are NaN or infinite, in {listed}. They are kept.")
    return Filled(variables, matched, notes)


def _weights(found: Entries) -> dict[str, np.ndarray]:
    """The entries but those to be passed over."""
    return {name: value for name, value in found.arrays.items() if not any(fnmatchcase(name, p) for p in found.ignore)}


def _head_difference(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, int]) -> str:
    """Why the head cannot be taken from the file, though it may differ; empty where it can, or where it should not differ so."""
    weight = arrays.get(f"{name}.weight")
    if weight is None:
        return f"The file has no head: {name}, of {shape[0]} classes, is as initialised." if f"{name}.bias" not in arrays else ""
    if weight.shape != shape and weight.shape[1:] == shape[1:]:
        return f"The file's head has {weight.shape[0]} classes, the network {shape[0]}: {name} is as initialised."
    return ""


def _values(leaves: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values of a head of which there may be only shapes."""
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
        return leaves
    inputs, classes = leaves["kernel"].shape
    return Dense(classes).init(jax.random.key(0), jnp.zeros((1, inputs)))["params"]


def _check_dtypes(arrays: Mapping[str, np.ndarray]) -> None:
    wrong = [f"{name} ({value.dtype})" for name, value in arrays.items() if not _is_float(value) and not is_counter(name)]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ConversionError(f"Weights must be floating-point; these are not: {listed}. Quantised weights cannot be converted.")


def _is_float(value: np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _cast(value: Any, dtype: Any, changes: dict[str, int]) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if np.isfinite(value).sum() != np.isfinite(result).sum():
        raise ConversionError(f"Some of the values are beyond the range of {np.dtype(dtype)}, which parameters have here.")
    change = f"{value.dtype} and are {np.dtype(dtype)} now"
    changes[change] = changes.get(change, 0) + 1
    return result
