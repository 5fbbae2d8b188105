"""Keys of state dicts: renames, patterns, what wrappers insert, counters."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Rename = tuple[str, str | Callable[[re.Match[str]], str]]

BATCH_COUNTER = "num_batches_tracked"  # of a norm
_AVERAGE_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
# What torch.compile, FSDP, activation checkpointing and Lightning's strategies put into keys, anywhere.
_WRAPPERS = r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module)\."

_MAX_TRIED = 50  # keys


class ConversionError(ValueError):
    """A state dict and a template do not fit each other; the message lists every difference."""


def is_counter(key: str) -> bool:
    """Return whether an entry counts batches or steps. Flax has no such counters; conversion ignores them."""
    return key == _AVERAGE_COUNTER or key.rpartition(".")[2] == BATCH_COUNTER


def wrapper_renames(keys: Iterable[str]) -> list[Rename]:
    """Return the renames that remove from keys what wrappers insert: `_orig_mod.` and the like, and a `module.` before all."""
    # DataParallel puts `module.` before every key; AveragedModel adds a counter.
    inner = [re.sub(_WRAPPERS, "", key) for key in keys if key != _AVERAGE_COUNTER]
    found = re.match(r"(module\.)*", inner[0] if inner else "")
    prefix = found[0] if found and all(key.startswith(found[0]) for key in inner) else ""
    return [(_WRAPPERS, ""), *([(f"^{re.escape(prefix)}", "")] if prefix else [])]


def rename_keys(arrays: Mapping[str, Any], rename: Sequence[Rename]) -> dict[str, Any]:
    """Apply each `(regular expression, replacement)` in turn to each key; two entries with one key are an error."""
    result: dict[str, Any] = {}
    for original, value in arrays.items():
        key = rename_key(original, rename)
        if key in result:
            raise ConversionError(f"Two entries have the key {key} after renaming; one of them was {original}.")
        result[key] = value
    return result


def rename_key(key: str, rename: Sequence[Rename]) -> str:
    """Apply each `(regular expression, replacement)` in turn to a key."""
    for pair in rename:
        try:
            pattern, replacement = pair
            key = re.sub(pattern, replacement, key)
        except (re.error, TypeError, ValueError) as error:
            raise ConversionError(
                f"rename is a sequence of pairs, (regular expression, replacement); {pair!r:.200}: {error}."
            ) from error
    return key


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Return whether a key matches one of the patterns, which have the syntax of file names (`fc.*`)."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def mending_rename(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """Return one `(regular expression, replacement)` that gives all entries the keys and shapes that are wanted, or None."""
    differing = [key for key in found if key not in wanted]
    missing = [key for key in wanted if key not in found]
    if not differing or len(found) != len(wanted):
        return None
    first = differing[0]
    for other in [key for key in missing if wanted[key] == found[first]][:_MAX_TRIED]:
        end = len(os.path.commonprefix([first[::-1], other[::-1]]))  # noqa: RUF071 letters, not folders
        old, new = first[: len(first) - end], other[: len(other) - end]
        start = len(os.path.commonprefix([old, new]))  # noqa: RUF071
        # What differs may be a prefix, a part anywhere, or one at the beginning of a module's name.
        rules = [(f"^{re.escape(old)}", new)] if start == 0 else []
        if part := re.escape(old[start:]):
            rules += [(part, new[start:]), (rf"(?<![^.]){part}", new[start:])]
        for rule in rules:
            renamed = {re.sub(*rule, key): shape for key, shape in found.items()}
            if renamed == dict(wanted):
                return rule
    return None
