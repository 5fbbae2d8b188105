"""The options of ScConv: the public versions of the operator, and the rules that its channels must follow.

`VARIANTS` holds the table of `scconv_jax/layers/reconstruction.py`, which says how the versions behave.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple

from flax import linen as nn


class Variant(NamedTuple):
    """The options that differ between the versions; `functional.spatial_reconstruction` explains them."""

    groups: int = 4
    epsilon: float = 1e-5
    unbiased: bool = False
    gate: Literal["soft", "hard"] = "soft"
    inclusive: bool = False
    gated: Literal["input", "norm"] = "input"
    fuse: Literal["pair", "all"] = "pair"
    floor: float = 0.0
    norm_names: tuple[str, str] = ("scale", "bias")  # parameter names of γ and β
    norm_axes: int = 0  # trailing axes of length 1 of γ and β
    norm_init: nn.initializers.Initializer = nn.initializers.ones  # of γ


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
"""The forms of ScConv by name: that of the paper (Li et al., CVPR 2023), and those of the public code's three versions."""

ARRANGEMENTS = ("S+C", "C+S", "S&C", "S", "C")
"""The units of ScConv and their order: SRU then CRU, CRU then SRU, both in parallel, the SRU alone, the CRU alone."""


class CRUSplit(NamedTuple):
    """The split of a CRU's channels into an upper and a lower part."""

    channels: int
    features: int
    alpha: float
    squeeze: int
    conv_groups: int

    def widths(self) -> tuple[int, int, int, int]:
        """Return the channels of the upper and the lower part before squeezing, then after it."""
        upper = int(self.alpha * self.channels)
        lower = self.channels - upper
        return upper, lower, upper // self.squeeze, lower // self.squeeze

    def problem(self) -> str:
        """Return a sentence that describes the first broken rule, or an empty string if the split is valid."""
        _, _, upper, lower = self.widths()
        options = f"alpha={self.alpha:g} and squeeze={self.squeeze}"
        if min(upper, lower) < 1:
            return (
                f"{options} reduce {self.channels} channels to {upper} in the upper and {lower} in the lower part; "
                "each part needs at least one."
            )
        if math.gcd(upper, self.features) % self.conv_groups:
            return (
                f"conv_groups={self.conv_groups} must divide the group-wise convolution's {upper} input channels "
                f"({options} of {self.channels} channels) and its {self.features} output channels."
            )
        if self.features < lower:
            return f"{options} pass {lower} of {self.channels} channels straight to the output, which has only {self.features}."
        return ""

    def suggestion(self) -> str:
        """Return a sentence with the nearest valid value of each option, given the other options."""
        whole = range(1, self.channels + 1)
        found = []
        for name, values in {"conv_groups": whole, "squeeze": whole, "alpha": [i / 8 for i in range(1, 8)]}.items():
            valid = [value for value in values if not self._replace(**{name: value}).problem()]
            if valid:
                _, nearest = min((abs(value - getattr(self, name)), value) for value in valid)
                found.append(f"{name}={nearest:g}")
        return f"Nearest valid options: {', or '.join(found)}." if found else "Use more channels."


def check_alpha(alpha: float) -> None:
    """Raise a ValueError unless α is a number between 0 and 1, both excluded."""
    if not isinstance(alpha, Real):
        raise ValueError(f"alpha={alpha!r} must be a number between 0 and 1, both excluded. The paper uses 0.5.")
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha={alpha:g} must be between 0 and 1, both excluded: it is the CRU's share of upper channels. "
            f"The nearest value tried in the paper is {'1/8' if alpha <= 0 else '7/8'}."
        )
