"""The options of ScConv: what the public versions of it differ in, and which values go together.

The table of the versions and what each does is in `scconv_jax.reconstruction`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Literal, NamedTuple

from flax import linen as nn


class Variant(NamedTuple):
    """What the versions of the operator differ in; see `functional.spatial_reconstruction` for the terms."""

    groups: int = 4
    epsilon: float = 1e-5
    unbiased: bool = False
    gate: Literal["soft", "hard"] = "soft"
    inclusive: bool = False
    gated: Literal["input", "norm"] = "input"
    fuse: Literal["pair", "all"] = "pair"
    floor: float = 0.0
    norm_names: tuple[str, str] = ("scale", "bias")  # of γ and β, as their checkpoints have them
    norm_axes: int = 0  # axes of length 1 after theirs
    norm_init: nn.initializers.Initializer = nn.initializers.ones


_HARD = Variant(
    epsilon=1e-10,
    unbiased=True,
    gate="hard",
    inclusive=True,
    fuse="all",
    norm_axes=2,
    norm_init=nn.initializers.normal(1.0),
)
VARIANTS = {
    "paper": Variant(floor=1e-6),
    "2023-07": _HARD._replace(groups=16, norm_names=("gamma", "beta")),
    "2023-09": _HARD._replace(gated="norm"),
    "2023-10": Variant(fuse="all"),
}

ARRANGEMENTS = ("S+C", "C+S", "S&C", "S", "C")


class Parts(NamedTuple):
    """How a CRU's channels are split, and whether they can be."""

    channels: int
    features: int
    alpha: float
    squeeze: int
    conv_groups: int

    def widths(self) -> tuple[int, int, int, int]:
        """Return the channels of the upper and the lower part, before and after they are squeezed."""
        upper = int(self.alpha * self.channels)
        lower = self.channels - upper
        return upper, lower, upper // self.squeeze, lower // self.squeeze

    def misfit(self) -> str:
        """Say which rule is broken; nothing where none is."""
        _, _, upper, lower = self.widths()
        split = f"alpha={self.alpha:g} and squeeze={self.squeeze} of {self.channels} channels"
        if min(upper, lower) < 1:
            return f"{split} leave {upper} and {lower} channels in the two parts; each needs at least one."
        if math.gcd(upper, self.features) % self.conv_groups:
            return (
                f"conv_groups={self.conv_groups} must divide the {upper} channels that {split} leave to the group-wise "
                f"convolution, and the {self.features} of the output."
            )
        if self.features < lower:
            return f"{split} pass {lower} channels straight to the output, which has only {self.features}."
        return ""

    def remedy(self) -> str:
        """Name the nearest value of each option that would do with the others as they are."""
        whole = range(1, self.channels + 1)
        found = []
        for name, values in {"conv_groups": whole, "squeeze": whole, "alpha": [i / 8 for i in range(1, 8)]}.items():
            fitting = [value for value in values if not self._replace(**{name: value}).misfit()]
            if fitting:
                _, nearest = min((abs(value - getattr(self, name)), value) for value in fitting)
                found.append(f"{name}={nearest:g}")
        return f"Nearest that would do: {', or '.join(found)}." if found else "Use more channels."


def check_alpha(alpha: float) -> None:
    """Raise a ValueError unless α is between 0 and 1, both excluded."""
    if not isinstance(alpha, Real):
        raise ValueError(f"alpha={alpha!r} must be a number between 0 and 1, both excluded. The paper's is 0.5.")
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha={alpha:g} is the share of the channels that is transformed richly; it must lie between 0 and 1, "
            f"both excluded. Nearest that the paper tried: {'1/8' if alpha <= 0 else '7/8'}."
        )


def check_choice(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Raise a ValueError, naming the nearest choice, unless `value` is one of them."""
    known = list(choices)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no {name} {value!r}.{hint} There are: {', '.join(map(repr, known))}.")
