"""The 1,000 classes of ImageNet (ILSVRC 2012): WordNet synsets and readable names. `imagenet.txt` names its source."""

from __future__ import annotations

import functools
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@functools.cache
def synsets() -> Mapping[str, str]:
    """Return the name of each class by its synset, in the order of the labels: `{"n01440764": "tench", ...}`."""
    text = Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8")
    rows = (line.partition(" ") for line in text.splitlines() if not line.startswith("#"))
    return MappingProxyType({synset: name for synset, _, name in rows})


def imagenet_name(name: str) -> str:
    """Return the readable name of the ImageNet class with this synset (`n01440764`), or `name` itself if there is none.

    `imagenet_name("n01440764")` is "tench". The names are the first lemmas of WordNet 3.0.
    """
    return synsets().get(name, name)
