"""Parts of error messages that the library and the trainer share: nearest valid names, shortened lists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(word: object, known: Iterable[str], *, most: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return up to `most` of the `known` names that resemble `word`, the nearest first."""
    return difflib.get_close_matches(str(word), list(known), n=most, cutoff=cutoff)


def did_you_mean(word: object, known: Iterable[str], *, most: int = 3, cutoff: float = 0.5) -> str:
    """Return " Did you mean 'a' or 'b'?", or an empty string if no known name resembles `word`."""
    found = nearest(word, known, most=most, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return "a, b, c and 7 more": the first `most` names and how many follow."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shortened(text: str, most: int = 80) -> str:
    """Return text of at most `most` letters, the last of them "…" if some were left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: object) -> str:
    """Return text with `?` for characters that cannot be printed, such as a terminal's control sequences in a file name."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))
