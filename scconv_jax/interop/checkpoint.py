"""Opens a source of weights and finds its entries' keys here, whatever wrappers, prefix and key convention the file has.

A key of the file becomes ours in four steps: what wrappers insert is removed (`_orig_mod.`), the user's renames are applied, a
prefix is removed (`model.`), and the renames of the key convention are applied, which is identified after the first three.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from scconv_jax.fusion.fuse import without_fused
from scconv_jax.interop import conventions
from scconv_jax.interop.conversion import to_torch
from scconv_jax.interop.keys import ConversionError, Rename, is_counter, matches, rename_key, rename_keys, wrapper_renames
from scconv_jax.messages import listed
from scconv_jax.models.registry import PUBLISHED
from scconv_jax.weights import Source, WeightsError, read, runs
from scconv_jax.weights.download import fetch
from scconv_jax.weights.selection import SelectionError, is_average

_Found = TypeVar("_Found")

_MAX_PREFIX = 4  # components


class Given(NamedTuple):
    """What the user says about the keys of a source."""

    convention: str | None = None
    rename: tuple[Rename, ...] = ()
    ignore: tuple[str, ...] = ()


class Checkpoint(NamedTuple):
    """A source of weights, its entries under our keys."""

    arrays: dict[str, np.ndarray]
    original: dict[str, np.ndarray]  # the entries under their own keys, without wrappers and prefix
    named: dict[str, np.ndarray]  # the same after the user's renames, before those of the key convention
    convention: conventions.KeyConvention
    source: Source
    ignore: tuple[str, ...]  # patterns of entries to skip: the convention's and the user's
    given: Given
    unreadable: dict[str, str]  # entries that cannot be converted, by our keys, and what they are
    prefix: str = ""  # the removed one
    outside: tuple[str, ...] = ()  # keys of the entries without the prefix, or in no module of the network
    others: tuple[str, ...] = ()  # other prefixes that the network fits

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The entries without those to skip."""
        return {key: value for key, value in self.arrays.items() if not matches(key, self.ignore)}

    def without(self, keys: Container[str]) -> Checkpoint:
        """Return the checkpoint without the entries with these of our keys."""
        ours = rename_keys(self.named, self.convention.rename)
        rows = [row for row in zip(ours, self.original, self.named, strict=True) if row[0] not in keys]
        original, named = ({row[i]: self.named[row[2]] for row in rows} for i in (1, 2))
        arrays = {key: value for key, value in self.arrays.items() if key not in keys}
        outside = (*self.outside, *(key for key in self.arrays if key in keys))
        return self._replace(arrays=arrays, original=original, named=named, outside=outside)

    @property
    def notes(self) -> list[str]:
        """What the user should know about the choice of the entries."""
        source, notes = self.source, []
        if source.others:
            average = "the moving average, " if is_average(source.key) else ""
            notes.append(
                f"The weights are {average}{source.key or 'those at the top level'}; the file also has "
                f"{listed(source.others)}. Choose with --key or key={source.others[0]!r}."
            )
        if source.format == "orbax" and (choice := runs.describe_choice(source.path, int(source.metadata["step"]))):
            notes.append(choice)
        if self.prefix:
            notes.append(f"The keys were taken without their prefix {self.prefix[:-1]!r}.")
        if self.others:
            notes.append(f"Other prefixes that fit: {listed(self.others)}. Choose with --key or key={self.others[0]!r}.")
        if outside := sorted(self.outside):
            found = listed(_grouped(outside), 5)
            notes.append(f"{len(outside)} entries are in no module of the network and were skipped: {found}.")
        if self.convention.caution:
            notes.append(self.convention.caution)
        return notes


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    key: str = "",
    checkpoint: str | int = "best",
    convention: str | None = None,
    rename: Sequence[Rename] = (),
    ignore: Sequence[str] = (),
) -> Checkpoint:
    """Read a source; a name or an address is downloaded first. `convention` overrides the identified one."""
    path, text = Path(source), str(source)
    if "://" in text or (re.fullmatch(r"\w[\w-]*", text) and not os.path.lexists(path)):  # a name, perhaps misspelt
        path = fetch(text, published=PUBLISHED)
        try:
            contents = read(path, key, checkpoint)
        except SelectionError:
            raise
        except WeightsError:
            path.unlink(missing_ok=True)  # perhaps a server's error page: the next call downloads again
            raise
    else:
        contents = read(path, key, checkpoint)
    if isinstance(ignore, str):  # each letter would be a pattern, and `*` would match everything
        raise ConversionError(f"ignore is a sequence of patterns: give [{ignore!r}].")
    return _below(contents, Given(convention, tuple(rename), tuple(ignore)), "")


def fitting(checkpoint: Checkpoint, fit: Callable[[Checkpoint], _Found]) -> tuple[Checkpoint, _Found]:
    """Return the checkpoint as it fits, and the result of `fit`: unchanged, or without a prefix that many keys have.

    If no prefix fits, the checkpoint is returned unchanged, with a false result.

    Raises:
        ConversionError: Several prefixes fit, and all or none of them but one are averages.
    """
    result = fit(checkpoint)
    if result or checkpoint.source.is_flax:
        return checkpoint, result
    found: list[tuple[Checkpoint, _Found]] = []
    for prefix in _prefixes(checkpoint):
        if not prefix.startswith(tuple(variant.prefix for variant, _ in found)):
            variant = _below(checkpoint.source, checkpoint.given, prefix)
            if fits := fit(variant):
                found.append((variant, fits))
    if not found:
        parts = _without_module(checkpoint)
        if parts and (result := fit(parts)):
            return parts, result
        return checkpoint, result
    prefixes = [variant.prefix for variant, _ in found]
    own = [item for item in found if not is_average(item[0].prefix)]
    if len(found) > 1 and len(own) != 1:
        raise ConversionError(
            f"{checkpoint.source.path} holds several sets of weights, whose keys begin with {listed(prefixes)}. Choose one by "
            f"its key: --key {prefixes[0][:-1]} on the command line, key={prefixes[0][:-1]!r} in Python."
        )
    chosen, result = found[0] if len(found) == 1 else own[0]
    others = tuple(prefix[:-1] for prefix in prefixes if prefix != chosen.prefix)
    return chosen._replace(others=others), result


def _without_module(checkpoint: Checkpoint) -> Checkpoint | None:
    """Return the checkpoint without the `module.` that DataParallel puts into keys if it holds parts of a network."""
    given = checkpoint.given._replace(rename=(*checkpoint.given.rename, (r"(?<![^.])module\.", "")))
    if all(".module." not in key for key in checkpoint.named):
        return None
    with contextlib.suppress(ConversionError):  # two entries have the same key then
        return _below(checkpoint.source, given, "")
    return None


def _grouped(keys: Iterable[str]) -> list[str]:
    """Return keys by their first component: `criterion.weight`, `ema_model.* (122)`."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.partition(".")[0], []).append(key)
    return [f"{name}.* ({len(group)})" if len(group) > 1 else group[0] for name, group in groups.items()]


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    """Return the prefixes that at least a tenth of the keys have, the most frequent first."""
    counts: Counter[str] = Counter()
    for key in checkpoint.named:
        counts.update(accumulate(f"{part}." for part in key.split(".")[:-1][:_MAX_PREFIX]))
    return [prefix for prefix, count in counts.most_common() if 10 * count >= len(checkpoint.named)]


def _below(source: Source, given: Given, prefix: str) -> Checkpoint:
    """Return the entries of a source whose keys have a prefix, without it."""
    tensors = to_torch(without_fused(source.variables)) if source.is_flax else source.tensors
    wrappers = [] if source.is_flax else wrapper_renames(tensors)
    own = rename_keys(tensors, wrappers)
    renamed = dict(zip(own, rename_keys(own, given.rename), strict=True))
    inside = [key for key in own if renamed[key].startswith(prefix)]
    original = {key.removeprefix(prefix): own[key] for key in inside}
    named = {renamed[key].removeprefix(prefix): own[key] for key in inside}
    if source.is_flax:
        convention = conventions.FLAX
    else:
        convention = conventions.identify(named) if given.convention is None else conventions.by_name(given.convention)
    arrays = rename_keys(named, convention.rename)
    if source.is_flax:  # `to_torch` adds counters, which the file does not have
        arrays = {key: value for key, value in arrays.items() if not is_counter(key)}
    for key in convention.linear:
        if key in arrays and arrays[key].shape[2:] == (1, 1):
            arrays[key] = arrays[key][:, :, 0, 0]
    unreadable = {}
    for name, kind in source.skipped.items():
        key = rename_key(name, [*wrappers, *given.rename])
        if kind.startswith("a ") and kind != "a tensor" and key.startswith(prefix):
            unreadable[rename_key(key.removeprefix(prefix), convention.rename)] = kind
    ignore = (*convention.ignore, *given.ignore, *(pattern.removeprefix(prefix) for pattern in given.ignore if prefix))
    outside = tuple(key for key in own if not renamed[key].startswith(prefix))
    return Checkpoint(arrays, original, named, convention, source, ignore, given, unreadable, prefix, outside)
