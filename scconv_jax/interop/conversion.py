"""PyTorch state dicts to Flax variables and back: NumPy alone, no torch, and no knowledge of any network.

The paths of our variables are PyTorch's names, so that one rule per kind of leaf is the whole conversion:

    layer1.0.scconv.k2.1.weight        (o, i, h, w)   params      layer1/0/scconv/k2/1/kernel   (h, w, i, o)
    fc.weight                          (o, i)         params      fc/kernel                     (i, o)
    bn1.weight, bn1.bias               (c,)           params      bn1/scale, bn1/bias           (c,)
    bn1.running_mean, bn1.running_var  (c,)           batch_stats bn1/mean, bn1/var             (c,)
    bn1.num_batches_tracked            ()             none: PyTorch uses it only where a norm has no momentum

Everything on either side is accounted for: an entry without a counterpart, or with one of another shape, is an error that
lists all such entries at once.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

Variables = dict[str, Any]
Rename = tuple[str, str | Callable[[re.Match[str]], str]]

_MOST_LISTED = 1000

_BATCHES, _AVERAGED = "num_batches_tracked", "n_averaged"  # of a norm; of torch.optim.swa_utils.AveragedModel


class ConversionError(ValueError):
    """A state dict and a template do not fit each other; the message lists every difference."""


class _Rule(NamedTuple):
    """One kind of leaf: its names on PyTorch's side, the one we write first, and how its axes come from there."""

    names: tuple[str, ...]
    from_torch: tuple[int, ...] | None = None


_RULES = {
    ("params", "kernel", 4): _Rule(("weight",), (2, 3, 1, 0)),
    ("params", "kernel", 2): _Rule(("weight",), (1, 0)),
    ("params", "scale", None): _Rule(("weight", "gamma")),
    ("params", "bias", None): _Rule(("bias", "beta")),
    ("params", "gamma", None): _Rule(("gamma", "weight")),
    ("params", "beta", None): _Rule(("beta", "bias")),
    ("batch_stats", "mean", None): _Rule(("running_mean",)),
    ("batch_stats", "var", None): _Rule(("running_var",)),
}


class _Leaf(NamedTuple):
    path: tuple[str, ...]
    value: Any  # an array, or what has its shape and dtype
    names: tuple[str, ...]
    axes: tuple[int, ...] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape on PyTorch's side."""
        shape = self.value.shape
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))


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
        state_dict: name to array: NumPy arrays or torch tensors. It may be wrapped as `{"state_dict": ...}`, and its names
            may begin with `module.`, as `DataParallel` writes them.
        template: the variables to fill, or only their shapes: `jax.eval_shape(model.init, ...)`.
        strict: raise where the two sides differ. If not, whatever has no counterpart of its shape is passed over, and keeps
            the value that it has in `template`.
        ignore: patterns (as of file names: `fc.*`) of PyTorch names to pass over on both sides, strict or not.
        rename: pairs of a regular expression and what replaces it (as of `re.sub`, text or a function), applied in turn to each
            of the state dict's names.

    Returns:
        Variables of the structure of `template`, NumPy arrays of the state dict's dtypes.

    Raises:
        ConversionError: listing every entry that nothing takes, every leaf that nothing fills, and every shape that differs.
    """
    return match(state_dict, template, strict=strict, ignore=ignore, rename=rename).variables


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the PyTorch state dict of a network's or layer's variables: the inverse of `from_torch`.

    Args:
        variables: `{"params": ..., "batch_stats": ...}`, the latter where there is any.

    Returns:
        Name to NumPy array, with the names and shapes that the reference's `state_dict()` has. Flax has no
        `num_batches_tracked`; it is 0, and PyTorch uses it only in a norm without momentum.

    Raises:
        ConversionError: for a leaf of a kind that no rule covers.
    """
    modules: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for leaf in _leaves(variables):
        value = np.asarray(leaf.value)
        value = _copy(value if leaf.axes is None else value.transpose(np.argsort(leaf.axes)))
        entries = modules.setdefault(leaf.path[1:-1], {})
        entries[leaf.names[0]] = value
        if leaf.path[0] == "batch_stats":
            entries["num_batches_tracked"] = np.zeros((), np.int64)
    order = ["weight", "gamma", "bias", "beta", "running_mean", "running_var", "num_batches_tracked"]
    return {
        ".".join((*module, name)): entries[name]
        for module, entries in modules.items()
        for name in sorted(entries, key=order.index)
    }


def is_counter(name: str) -> bool:
    """Whether an entry counts batches or steps, which Flax does not: such are ignored."""
    return name == _AVERAGED or name.rpartition(".")[2] == _BATCHES


def shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that `to_torch` would give; `variables` may be shapes only. Without `num_batches_tracked`."""
    return {_qualified(leaf)[0]: leaf.shape for leaf in _leaves(variables)}


class Match(NamedTuple):
    """What became of each entry of a state dict and of each leaf of a template."""

    variables: Variables
    converted: list[str]  # entries that fill a leaf
    ignored: list[str]  # entries passed over by name
    unused: list[str]  # entries that no leaf takes (strict=False)
    unfilled: list[str]  # leaves, by their PyTorch name, that keep the template's value (strict=False, or ignored)


def match(
    state_dict: Mapping[str, Any],
    template: Mapping[str, Any],
    *,
    strict: bool = True,
    ignore: Sequence[str] = (),
    rename: Sequence[Rename] = (),
) -> Match:
    """Do what `from_torch` does, and account for every entry; same arguments and errors."""
    if isinstance(ignore, str):  # each of its letters would be a pattern, and `*` would pass over everything
        raise ConversionError(f"ignore is a sequence of patterns: give [{ignore!r}].")
    source = normalised(state_dict, rename)
    leaves = list(_leaves(template))
    ignored = [name for name in source if is_counter(name) or _matches(name, ignore)]
    passed_over = set(ignored)
    available = {name: value for name, value in source.items() if name not in passed_over}
    converted, unfilled, differing = [], [], []
    variables: Variables = {collection: {} for collection in template}
    for leaf in leaves:
        name = next((n for n in _qualified(leaf) if n in available), None)
        value = leaf.value
        if name is None:
            unfilled.append(leaf)
        elif not _same_shape(available[name].shape, leaf.shape):
            differing.append((name, leaf))
        else:
            value = available[name].reshape(leaf.shape)
            value = _copy(value if leaf.axes is None else value.transpose(leaf.axes))
            converted.append(name)
        _insert(variables, leaf.path, value)
    used = {*converted, *(name for name, _ in differing)}
    unused = [name for name in available if name not in used]
    missing = [leaf for leaf in unfilled if not _matches(leaf.names and _qualified(leaf)[0], ignore)]
    if strict and (unused or missing or differing):
        raise ConversionError(_differences(available, leaves, unused, missing, differing))
    kept = [*unfilled, *(leaf for _, leaf in differing)]
    abstract = [_qualified(leaf)[0] for leaf in kept if isinstance(leaf.value, jax.ShapeDtypeStruct)]
    if abstract:
        raise ConversionError(
            f"Nothing fills {_listing(abstract)}, and the template has only shapes. "
            "Give the network's initial variables as the template, whose values these leaves then keep."
        )
    unused += [name for name, _ in differing]
    return Match(variables, converted, ignored, unused, [_qualified(leaf)[0] for leaf in kept])


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[_Leaf]:
    if not path and not (isinstance(tree, Mapping) and {"params", "batch_stats"}.issuperset(tree)):
        found = f"one of {_listing(list(map(str, tree)))}" if isinstance(tree, Mapping) else type(tree).__name__
        raise ConversionError(f'Variables are {{"params": ..., "batch_stats": ...}}, as `model.init` returns them; got {found}.')
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
            continue
        kind = (here[0], key)
        rule = _RULES.get((*kind, len(value.shape))) or _RULES.get((*kind, None))
        if rule is None:
            known = ", ".join(sorted({f"{collection}/…/{leaf}" for collection, leaf, _ in _RULES}))
            raise ConversionError(
                f"No rule converts the leaf {'/'.join(here)} of shape {tuple(value.shape)}; there are rules for {known}."
            )
        yield _Leaf(here, value, rule.names, rule.from_torch)


def _qualified(leaf: _Leaf) -> list[str]:
    return [".".join((*leaf.path[1:-1], name)) for name in leaf.names]


def normalised(state_dict: Mapping[str, Any], rename: Sequence[Rename] = ()) -> dict[str, np.ndarray]:
    """Take a state dict out of its wrapper, its names' `module.` or `_orig_mod.` away, and apply `rename`."""
    if not isinstance(state_dict, Mapping):
        raise ConversionError(
            f"A state dict maps names to arrays; got {type(state_dict).__name__}. Give `model.state_dict()`, or for a file use "
            "`scconv_jax.load_model` or `scconv_jax.load_weights`."
        )
    while "state_dict" in state_dict and isinstance(state_dict["state_dict"], Mapping):
        state_dict = state_dict["state_dict"]
    if unnamed := [name for name in state_dict if not isinstance(name, str)]:
        raise ConversionError(f"The names of a state dict are texts; one of them is {unnamed[0]!r:.100}.")
    outer = _outer_modules(state_dict)
    result: dict[str, np.ndarray] = {}
    for original, value in state_dict.items():
        name = original.removeprefix(outer)
        for pair in rename:
            name = _renamed(name, pair)
        if name in result:
            raise ConversionError(f"Two entries have the name {name} after renaming; one of them was {original}.")
        result[name] = _to_numpy(original, value)
    return result


def _outer_modules(names: Iterable[str]) -> str:
    """What DataParallel and the like (`module.`) and `torch.compile` (`_orig_mod.`) put before the names, in any order."""
    names = [name for name in names if name != _AVERAGED]
    begin = re.match(r"(module\.|_orig_mod\.)*", names[0] if names else "")
    outer = begin[0] if begin else ""
    return outer if all(name.startswith(outer) for name in names) else ""


def _renamed(name: str, pair: Rename) -> str:
    try:
        pattern, replacement = pair
        return re.sub(pattern, replacement, name)
    except (re.error, TypeError, ValueError) as error:
        raise ConversionError(
            f"rename is a sequence of pairs, (regular expression, replacement); {pair!r:.200}: {error}."
        ) from error


def _to_numpy(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; NumPy has no bfloat16 of its own
        value = value.detach().cpu()
        value = value.float().numpy().astype(ml_dtypes.bfloat16) if "bfloat16" in str(value.dtype) else value.numpy()
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ConversionError(
            f"Entry {name} is no array but {type(value).__name__}. Give the state dict alone (`model.state_dict()`), not a whole "
            "checkpoint or model."
        )
    return np.asarray(value)


def _copy(value: np.ndarray) -> np.ndarray:
    """Copy to contiguous memory of its own: what is written to the result must not reach the source."""
    return np.array(value, order="C")


def _same_shape(source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether the shapes are equal, or a vector's with axes of length 1 after it: (c,) and (c, 1, 1)."""
    vectors = math.prod(source) == math.prod(target) == source[0] == target[0] if source and target else False
    return source == target or vectors


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _insert(tree: Variables, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _differences(
    source: Mapping[str, np.ndarray],
    leaves: Sequence[_Leaf],
    unused: Sequence[str],
    missing: Sequence[_Leaf],
    differing: Sequence[tuple[str, _Leaf]],
) -> str:
    lines = ["The state dict does not fit the template."]
    if unused:
        nearest = _nearest_among([_qualified(leaf)[0] for leaf in leaves])
        lines.append(f"{len(unused)} of its entries have no place:")
        lines += [f"  {name} {source[name].shape}{nearest(name)}" for name in unused[:_MOST_LISTED]]
        lines += [f"  and {len(unused) - _MOST_LISTED} more"] if len(unused) > _MOST_LISTED else []
    if missing:
        nearest = _nearest_among(list(source)[: 10 * _MOST_LISTED])
        lines.append(f"{len(missing)} entries are not in it:")
        lines += [f"  {(name := _qualified(leaf)[0])} {leaf.shape}{nearest(name)}" for leaf in missing]
    if differing:
        lines.append(f"{len(differing)} entries have another shape:")
        lines += [f"  {name}: {source[name].shape} in the state dict, {leaf.shape} expected" for name, leaf in differing]
    lines.append("Give the matching model and options, or name entries to pass over (ignore), or pass over all (strict=False).")
    return "\n".join(lines)


def _nearest_among(names: Iterable[str]) -> Callable[[str], str]:
    """Return what says the nearest of `names` to a name.

    To compare all letters of all pairs would take a minute for two networks of 600 entries: only those are compared that
    have most components in common, and, where none has any, all of them for the first few that ask.
    """
    having: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        for part in set(name.split(".")):
            having.setdefault(part, []).append(name)
    patience = iter(range(20))

    def nearest(name: str) -> str:
        shared = Counter(other for part in set(name.split(".")) for other in having.get(part, ()))
        candidates = [other for other, _ in shared.most_common(20)]
        if not candidates and next(patience, None) is not None:
            candidates = [other for others in having.values() for other in others]
        found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
        return f" (nearest: {found[0]})" if found and found[0] != name else ""

    return nearest


def _listing(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
