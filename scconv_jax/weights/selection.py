"""Chooses the weights in a checkpoint that holds several sets of weights, or other things beside them.

A set of weights is a dictionary of tensors by name: the checkpoint itself, or one inside other dictionaries (`state_dict`,
`model.state_dict`). One that is alone is taken, whatever its name. Of several, the moving average is taken if exactly one has
the name of an average (`state_dict_ema`, `params_ema`, `ema.module`), as timm does; otherwise the user chooses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from scconv_jax.messages import did_you_mean, listed
from scconv_jax.weights.files import WeightsError

_MAX_DEPTH = 4
_NOT_NETWORKS = {"optim", "optimizer", "optimizers", "scheduler", "criterion", "loss", "callbacks"}


class SelectionError(WeightsError):
    """A good file does not have the weights that the user asked for, or the user must choose."""


class Selection(NamedTuple):
    """A set of weights of a checkpoint."""

    key: str  # where it is: `state_dict`, `model.state_dict`; empty for the checkpoint itself
    entries: dict[Any, Any]
    skipped: dict[Any, Any]  # the other items of the dictionaries around it
    others: tuple[str, ...]  # keys of the other sets of weights, if the user did not choose


def is_average(key: str) -> bool:
    """Return whether a set of weights has the name of a moving average."""
    return not _words(key).isdisjoint({"ema", "ewa", "swa", "avg", "average", "averaged", "shadow"})


def select(checkpoint: Mapping[Any, Any], key: str = "") -> Selection | None:
    """Return the set of weights at `key`, or the one to take if `key` is empty; None if the checkpoint has no tensors by name.

    Args:
        checkpoint: Dictionaries in dictionaries; a tensor is anything with a `shape`.
        key: Where the weights are (`model.state_dict`; `.` for the checkpoint itself), or the prefix of their names in a set
            (`ema_model`).

    Raises:
        SelectionError: There are no weights at `key`; or there are several sets, and the user must choose.
    """
    sets = _find(checkpoint)
    networks = [place for place in sets if _words(place).isdisjoint(_NOT_NETWORKS)] or list(sets)
    if not networks:
        return None
    averages = [place for place in networks if is_average(place)]
    place = key.removeprefix(".")
    if key and place not in sets:
        return _below_prefix(sets, key)
    if not key and len(networks) > 1 and len(averages) != 1:
        raise SelectionError(
            f"it holds several sets of weights: {_named(networks)}. Choose one by its key: --key {networks[-1]} on the command "
            f"line, key={networks[-1]!r} in Python"
        )
    if not key:
        place = networks[0] if len(networks) == 1 else averages[0]
    chain = sets[place]
    skipped = {name: item for outer, inner in pairwise(chain) for name, item in outer.items() if item is not inner}
    others = () if key else tuple(other or "." for other in networks if other != place)
    return Selection(place, dict(chain[-1]), skipped, others)


def _below_prefix(sets: Mapping[str, tuple[Mapping[Any, Any], ...]], key: str) -> Selection:
    """Return the entries under the prefix `key`, with the prefix removed."""
    found: list[Selection] = []
    for place, chain in sets.items():
        prefix = key.removeprefix(f"{place}.") + "."
        below = [name for name in chain[-1] if isinstance(name, str) and name.startswith(prefix)]
        if below:
            rest = dict(chain[-1])
            entries = {name.removeprefix(prefix): rest.pop(name) for name in below}
            found.append(Selection(key, entries, rest, ()))
    if len(found) != 1:
        names = [name for chain in sets.values() for name in chain[-1] if isinstance(name, str)]
        known = list(dict.fromkeys([*filter(None, sets), *(name.partition(".")[0] for name in names)]))
        hint = did_you_mean(key, known[:1000], most=1)
        raise SelectionError(f"it has no weights under the key {key!r}.{hint} Its keys: {listed(known)}")
    return found[0]


def _find(checkpoint: Mapping[Any, Any]) -> dict[str, tuple[Mapping[Any, Any], ...]]:
    """Return each set of weights by its key, with the dictionaries around it, the outermost first."""
    found: dict[str, tuple[Mapping[Any, Any], ...]] = {}
    axes: dict[str, list[int]] = {}
    seen: set[int] = set()  # a dictionary may be in several, or in itself
    level: list[tuple[tuple[str, ...], tuple[Mapping[Any, Any], ...]]] = [((), (checkpoint,))]
    for _ in range(_MAX_DEPTH + 1):
        below = []
        for keys, chain in level:
            if id(chain[-1]) in seen:
                continue
            seen.add(id(chain[-1]))
            place = ".".join(keys)
            items = [(key, item) for key, item in chain[-1].items() if isinstance(key, str)]
            axes[place] = [len(item.shape) for _, item in items if hasattr(item, "shape")]
            found[place] = chain
            if not keys or max(axes[place], default=0) < 2:
                below += [((*keys, key), (*chain, item)) for key, item in items if isinstance(item, Mapping)]
        level = below
    # A network has kernels, of two axes or more; means, metrics and random states beside it have fewer.
    most = min(2, max(map(max, filter(None, axes.values())), default=0))
    found = {place: chain for place, chain in found.items() if max(axes[place], default=-1) >= most}
    if len(found) > 1 and sum(count > 1 for count in axes[""]) < 2:  # a single matrix, perhaps of confusion
        found.pop("", None)
    return found


def _words(key: str) -> set[str]:
    return set(re.split(r"[^a-z]+", key.lower()))


def _named(places: Any) -> str:
    return listed([place or ". (the top level)" for place in places])
