"""PyTorch state dicts to Flax variables and back, with NumPy alone: no torch, and no knowledge of any network.

The paths of our variables are PyTorch's keys, so one rule for each kind of leaf is the whole conversion:

    layer1.0.scconv.k2.1.weight        (o, i, h, w)   params      layer1/0/scconv/k2/1/kernel   (h, w, i, o)
    fc.weight                          (o, i)         params      fc/kernel                     (i, o)
    bn1.weight, bn1.bias               (c,)           params      bn1/scale, bn1/bias           (c,)
    bn1.running_mean, bn1.running_var  (c,)           batch_stats bn1/mean, bn1/var             (c,)
    bn1.num_batches_tracked            ()             none: PyTorch reads it only in a norm without momentum

Every entry and every leaf is accounted for. An entry without a leaf, a leaf without an entry, or another shape is an error,
and one error lists all of them.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from scconv_jax.fusion.forms import LEAVES
from scconv_jax.interop.keys import (
    BATCH_COUNTER,
    ConversionError,
    Rename,
    is_counter,
    matches,
    mending_rename,
    rename_key,
    rename_keys,
    wrapper_renames,
)
from scconv_jax.messages import listed, nearest
from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.selection import select

Variables = dict[str, Any]

_MAX_LISTED = 1000
_ADVICE = "Give the matching model and options, new keys (rename), or patterns of entries to skip (ignore)"


class _Rule(NamedTuple):
    """Conversion of one kind of leaf: PyTorch's names (we write the first) and the transposition from PyTorch."""

    names: tuple[str, ...]
    axes: tuple[int, ...] | None = None

    @property
    def axes_back(self) -> list[int] | None:
        """The transposition to PyTorch."""
        return None if self.axes is None else np.argsort(self.axes).tolist()


_RULES = {  # (collection, name of the leaf, number of axes)
    ("params", "kernel", 4): _Rule(("weight",), (2, 3, 1, 0)),
    ("params", "kernel", 2): _Rule(("weight",), (1, 0)),
    ("params", "scale", None): _Rule(("weight", "gamma")),
    ("params", "bias", None): _Rule(("bias", "beta")),
    ("params", "gamma", None): _Rule(("gamma", "weight")),
    ("params", "beta", None): _Rule(("beta", "bias")),
    ("batch_stats", "mean", None): _Rule(("running_mean",)),
    ("batch_stats", "var", None): _Rule(("running_var",)),
}
_ORDER = ["weight", "gamma", "bias", "beta", "running_mean", "running_var", BATCH_COUNTER]


class _Leaf(NamedTuple):
    path: tuple[str, ...]
    value: Any  # an array, or a shape and dtype
    rule: _Rule

    @property
    def keys(self) -> list[str]:
        """PyTorch's possible keys for the leaf; we write the first."""
        return [".".join((*self.path[1:-1], name)) for name in self.rule.names]

    @property
    def shape(self) -> tuple[int, ...]:
        """PyTorch's shape of the leaf."""
        shape, axes = self.value.shape, self.rule.axes_back
        return shape if axes is None else tuple(shape[i] for i in axes)


def from_torch(
    state_dict: Mapping[str, Any],
    template: Mapping[str, Any],
    *,
    strict: bool = True,
    ignore: Sequence[str] = (),
    rename: Sequence[Rename] = (),
) -> Variables:
    """Fill the variables of a network or layer from a PyTorch state dict.

    Args:
        state_dict: Key to array: NumPy arrays or torch tensors. It may be inside a checkpoint (`{"state_dict": ...}`), and its
            keys may have what `DataParallel`, `torch.compile` and FSDP insert (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`).
        template: The variables to fill, or only their shapes: `jax.eval_shape(model.init, ...)`.
        strict: If True, any difference is an error. If False, entries and leaves without a counterpart of their shape are
            skipped, and such leaves keep their value in `template`.
        ignore: Patterns of PyTorch keys, in the syntax of file names (`fc.*`), to skip on both sides, strict or not.
        rename: Pairs of a regular expression and its replacement, text or function as for `re.sub`, applied in turn to each key.

    Returns:
        Variables with the structure of `template`, NumPy arrays with the state dict's dtypes.

    Raises:
        ConversionError: The sides differ. The message lists every entry without a leaf, every leaf without an entry, and every
            shape that differs.
    """
    arrays = rename_keys(to_arrays(state_dict), rename)
    return convert(arrays, template, strict=strict, ignore=ignore, advice=f"{_ADVICE}, or skip all (strict=False)").variables


def to_torch(variables: Mapping[str, Any], *, rename: Sequence[Rename] = ()) -> dict[str, np.ndarray]:
    """Return the PyTorch state dict for the variables of a network or layer: the inverse of `from_torch`.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`; `batch_stats` may be absent.
        rename: As for `from_torch`, applied to the keys that the paths of the variables give.

    Returns:
        Key to NumPy array, before renaming with the keys and shapes of the reference's `state_dict()`. Flax has no
        `num_batches_tracked`; it is 0, and PyTorch reads it only in a norm without momentum.

    Raises:
        ConversionError: No rule covers a leaf, or two keys are equal after renaming.
    """
    modules: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for leaf in _leaves(variables):
        entries = modules.setdefault(leaf.path[1:-1], {})
        entries[leaf.rule.names[0]] = _copy(np.asarray(leaf.value), leaf.rule.axes_back)
        if leaf.path[0] == "batch_stats":
            entries[BATCH_COUNTER] = np.zeros((), np.int64)
    arrays = {
        ".".join((*module, name)): entries[name]
        for module, entries in modules.items()
        for name in sorted(entries, key=_ORDER.index)
    }
    return rename_keys(arrays, rename)


def rename_variables(variables: Mapping[str, Any], rename: Sequence[Rename]) -> Variables:
    """Return variables under the paths that renaming the keys of their state dict gives.

    Raises:
        ConversionError: The last part of a key, such as `weight`, changes, or two keys are equal after renaming.
    """
    result: dict[tuple[str, ...], Any] = {}
    for leaf in _leaves(variables):
        *modules, kind = rename_key(leaf.keys[0], rename).split(".")
        path = (leaf.path[0], *modules, leaf.path[-1])
        if kind != leaf.rule.names[0] or path in result:
            new = ".".join([*modules, kind])
            raise ConversionError(f"rename may change only the names of modules, each to another; {leaf.keys[0]} becomes {new}.")
        result[path] = leaf.value
    return {collection: {} for collection in variables} | traverse_util.unflatten_dict(result)


def shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of `to_torch(variables)`, without counters. The leaves may be only shapes."""
    return {leaf.keys[0]: leaf.shape for leaf in _leaves(variables)}


def covers(keys: Container[str], template: Mapping[str, Any], ignore: Sequence[str] = ()) -> bool:
    """Return whether a state dict of these keys has an entry for every leaf of a template, except the ignored ones."""
    return all(any(key in keys for key in leaf.keys) or matches(leaf.keys[0], ignore) for leaf in _leaves(template))


class Conversion(NamedTuple):
    """Converted variables, and what happened to each entry and each leaf."""

    variables: Variables
    converted: list[str]  # entries converted to a leaf
    ignored: list[str]  # counters, and entries that match a pattern of `ignore`
    unused: list[str]  # entries without a leaf (only if not strict)
    kept: list[str]  # PyTorch keys of the leaves that keep the template's value (only if not strict, or ignored)


def convert(
    arrays: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
    *,
    strict: bool = True,
    ignore: Sequence[str] = (),
    advice: str = _ADVICE,
) -> Conversion:
    """Convert NumPy arrays under their final keys, as `from_torch` does, and report what happened to each entry.

    `advice` ends the list of differences.
    """
    if isinstance(ignore, str):  # each letter would be a pattern, and `*` would match everything
        raise ConversionError(f"ignore is a sequence of patterns: give [{ignore!r}].")
    leaves = list(_leaves(template))
    ignored = [key for key in arrays if is_counter(key) or matches(key, ignore)]
    skipped = set(ignored)
    available = {key: value for key, value in arrays.items() if key not in skipped}
    converted: list[str] = []
    missing: list[_Leaf] = []
    mismatched: list[tuple[str, _Leaf]] = []
    values: dict[tuple[str, ...], Any] = {}
    for leaf in leaves:
        key = next((key for key in leaf.keys if key in available), None)
        value = leaf.value
        if key is None:
            missing.append(leaf)
        elif not _same_shape(available[key].shape, leaf.shape):
            mismatched.append((key, leaf))
        else:
            value = _copy(available[key].reshape(leaf.shape), leaf.rule.axes)
            converted.append(key)
        values[leaf.path] = value
    used = {*converted, *(key for key, _ in mismatched)}
    unused = [key for key in available if key not in used]
    required = [leaf for leaf in missing if not matches(leaf.keys[0], ignore)]
    if strict and (unused or required or mismatched):
        raise ConversionError(_differences(available, leaves, unused, required, mismatched, advice))
    kept = [*missing, *(leaf for _, leaf in mismatched)]
    if without_value := [leaf.keys[0] for leaf in kept if isinstance(leaf.value, jax.ShapeDtypeStruct)]:
        raise ConversionError(
            f"The state dict has no values for {listed(without_value, 5)}, and the template has only shapes. "
            "Give the network's initial variables as the template; these leaves keep its values."
        )
    unused += [key for key, _ in mismatched]
    variables = {collection: {} for collection in template} | traverse_util.unflatten_dict(values)  # a collection may be empty
    return Conversion(variables, converted, ignored, unused, [leaf.keys[0] for leaf in kept])


def to_arrays(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a state dict as NumPy arrays, without the dictionaries around it and what wrappers insert into its keys."""
    if not isinstance(state_dict, Mapping):
        raise ConversionError(
            f"A state dict maps keys to arrays; got {type(state_dict).__name__}. Give `model.state_dict()`, or for a file use "
            "`scconv_jax.load_model` or `scconv_jax.load_weights`."
        )
    try:
        selected = select(state_dict)
    except WeightsError as error:
        raise ConversionError(f"The state dict cannot be used: {error}.") from None
    if selected is not None and selected.key:
        state_dict = selected.entries
    if not_strings := [key for key in state_dict if not isinstance(key, str)]:
        raise ConversionError(f"The keys of a state dict are strings; one of them is {not_strings[0]!r:.100}.")
    return rename_keys({key: _to_numpy(key, value) for key, value in state_dict.items()}, wrapper_renames(state_dict))


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[_Leaf]:
    if not path and not (isinstance(tree, Mapping) and {"params", "batch_stats"}.issuperset(tree)):
        found = f"the keys {listed(list(map(str, tree)), 5)}" if isinstance(tree, Mapping) else type(tree).__name__
        raise ConversionError(f'Variables are {{"params": ..., "batch_stats": ...}}, as `model.init` returns them; got {found}.')
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
            continue
        rule = _RULES.get((here[0], key, len(value.shape))) or _RULES.get((here[0], key, None))
        if rule is None:
            known = ", ".join(sorted({f"{collection}/…/{leaf}" for collection, leaf, _ in _RULES}))
            cure = " The variables are fused: convert those that were given to scconv_jax.fuse." if key in LEAVES else ""
            raise ConversionError(
                f"No rule converts the leaf {'/'.join(here)} of shape {tuple(value.shape)}; there are rules for {known}.{cure}"
            )
        yield _Leaf(here, value, rule)


def _to_numpy(key: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, whose own conversion has no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy().astype(ml_dtypes.bfloat16) if "bfloat16" in str(value.dtype) else value.numpy()
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ConversionError(
            f"Entry {key} is not an array but {type(value).__name__}. Give only the state dict (`model.state_dict()`), not a "
            "whole checkpoint or model."
        )
    return np.asarray(value)


def _copy(value: np.ndarray, axes: Sequence[int] | None) -> np.ndarray:
    """Transpose and copy to contiguous memory, so that writing to the result does not change the source."""
    return np.array(value if axes is None else value.transpose(axes), order="C")


def _same_shape(source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether shapes are equal, or are vectors that differ in trailing axes of length 1: (c,) and (c, 1, 1)."""
    vectors = math.prod(source) == math.prod(target) == source[0] == target[0] if source and target else False
    return source == target or vectors


def _differences(
    arrays: Mapping[str, np.ndarray],
    leaves: Sequence[_Leaf],
    unused: Sequence[str],
    missing: Sequence[_Leaf],
    mismatched: Sequence[tuple[str, _Leaf]],
    advice: str,
) -> str:
    lines = ["The state dict does not fit the template."]
    wanted = {leaf.keys[0]: leaf.shape for leaf in leaves}
    if rule := mending_rename({key: value.shape for key, value in arrays.items()}, wanted):
        lines.append(f"All keys differ alike: rename=[{rule!r}], or --rename {shlex.join(rule)}, would mend it.")
    named: set[str] = set()
    if unused:
        hint = _nearest_among(list(wanted), named)
        lines.append(f"{len(unused)} of its entries have no leaf:")
        lines += [f"  {key} {arrays[key].shape}{hint(key)}" for key in unused[:_MAX_LISTED]]
        lines += [f"  and {len(unused) - _MAX_LISTED} more"] if len(unused) > _MAX_LISTED else []
    if missing:
        rest = [leaf for leaf in missing if leaf.keys[0] not in named]
        above = f", {len(missing) - len(rest)} of them named above" if len(rest) < len(missing) else ""
        hint = _nearest_among(list(arrays)[: 10 * _MAX_LISTED])
        lines.append(f"{len(missing)} entries are missing{above}{':' if rest else '.'}")
        lines += [f"  {leaf.keys[0]} {leaf.shape}{hint(leaf.keys[0])}" for leaf in rest]
    if mismatched:
        lines.append(f"{len(mismatched)} entries have another shape:")
        lines += [f"  {key}: {arrays[key].shape} in the state dict, {leaf.shape} expected" for key, leaf in mismatched]
    lines.append(f"{advice}.")
    return "\n".join(lines)


def _nearest_among(keys: Iterable[str], named: set[str] | None = None) -> Callable[[str], str]:
    """Return a function that names the nearest of `keys` to a key, and adds it to `named`.

    Comparing all pairs letter by letter would take a minute for two networks of 600 entries. So only the keys with the most
    components in common are compared. If there are none, the first few calls compare all keys.
    """
    by_component: dict[str, list[str]] = {}
    for key in dict.fromkeys(keys):
        for part in set(key.split(".")):
            by_component.setdefault(part, []).append(key)
    full_searches = iter(range(20))

    def hint(key: str) -> str:
        shared = Counter(other for part in set(key.split(".")) for other in by_component.get(part, ()))
        candidates = [other for other, _ in shared.most_common(20)]
        if not candidates and next(full_searches, None) is not None:
            candidates = [other for others in by_component.values() for other in others]
        found = nearest(key, candidates, most=1, cutoff=0.6)
        if named is not None:
            named.update(found)
        return f" (nearest: {found[0]})" if found and found[0] != key else ""

    return hint
