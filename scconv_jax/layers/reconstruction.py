"""Spatial and channel reconstruction convolution (ScConv): SRU, then CRU.

Paper: Li, Wen, He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023, pp. 6153-6162,
DOI 10.1109/CVPR52729.2023.00596. Its authors published no code. The public code, https://github.com/cheng-haha/ScConv, has three
versions that differ from the paper and from each other. `variant` selects the paper's form or a version:

    variant    group norm              initial γ   gate                 gated    softmax over      groups
    paper      √(σ² + 1e-5)            1           W > t: 1, else W     X        pair (Eq. 8)      4
    2023-07    unbiased σ + 1e-10      normal      W >= t: 1, else 0    X        all channels      16
    2023-09    unbiased σ + 1e-10      normal      W >= t: 1, else 0    GN(X)    all channels      4
    2023-10    √(σ² + 1e-5)            1           W > t: 1, else W     X        all channels      4

How they behave, and which to choose:

- "paper" for new networks. The output has the scale of the convolution that the operator replaces. γ and β receive gradients
  through the weights W at or below t.
- "2023-10" for checkpoints of the last public code. The softmax over all 2C averages makes the output about C times smaller; a
  norm after the operator corrects that. γ and β receive gradients as in "paper".
- "2023-09": the output is as small as in "2023-10". γ and β receive gradients through the gated GN(X).
- "2023-07": the output is as small. The gate is a step function and X is gated, so γ and β receive no gradient and keep their
  initial values.

The weights are γ / Σγ. If Σγ is near zero, which can happen with normally distributed γ, the weights are huge and the gate
becomes a step function. "paper" starts with γ = 1 and bounds |Σγ| from below by 1e-6, so its output is always finite. If all
values of a group are equal, GN(X) is β, and for β = 0 every W is exactly 0.5 = t. "2023-07" and "2023-09" treat these as
informative.

Differences: the paper does not define these points. Here, weights at or below t are kept, as in the last public code; an average
pool before the units has the strides; a 1×1 convolution follows if the channels change; "S&C" adds the outputs of both units. The
table gives the number of groups and ε.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_choice, check_odd
from scconv_jax.layers.base import Layer, inherited, parameter
from scconv_jax.layers.core import Conv, Dtype, Factory, kaiming_normal
from scconv_jax.layers.variants import ARRANGEMENTS, VARIANTS, CRUSplit, Variant, check_alpha
from scconv_jax.shapes import Array, Float

_KEEPS_SIZE: Mapping[str, str] = dict.fromkeys(
    ("strides", "stride"), "The unit keeps the size of the map; ScConv(strides=...) pools before it."
)


class Norm(nn.Module):
    """The parameters γ and β of the group norm, with the names and shapes of the variant's checkpoints."""

    variant: Variant

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Return γ and β, each `(channels,)`."""
        shape = (channels, *[1] * self.variant.norm_axes)
        gamma, beta = self.variant.norm_names
        dtype = inherited(self, "param_dtype", jnp.float32)
        return (
            parameter(self, gamma, self.variant.norm_init, shape, dtype).reshape(channels),
            parameter(self, beta, nn.initializers.zeros, shape, dtype).reshape(channels),
        )


class SRU(Layer, kw_only=True):
    """Spatial reconstruction unit: `(n, h, w, c)` to the same shape; see `functional.spatial_reconstruction`.

    Source: Li et al., CVPR 2023, Eqs. 1-4.

    Attributes:
        variant: "paper", "2023-07", "2023-09" or "2023-10". It sets every attribute below that is None.
        groups: Groups of the group norm; must divide c, which must be even.
        threshold: t, threshold of the gate.
        epsilon: ε of the group norm.
        unbiased: Whether the group norm divides by the unbiased standard deviation.
        gate: "soft" or "hard".
        inclusive: Whether a weight equal to t counts as informative.
        gated: "input" or "norm".
        dtype: Dtype of the result. If None, the dtype of `x`. Statistics and gates are computed in float32 or float64.
        param_dtype: See `Layer`.

    Raises:
        TypeError: If an option is unknown or given by position.
        ValueError: If a value is not one of its choices, c is odd or `groups` does not divide c.
    """

    advice: ClassVar[Mapping[str, str]] = _KEEPS_SIZE

    variant: str = "paper"
    groups: int | None = None
    threshold: float = 0.5
    epsilon: float | None = None
    unbiased: bool | None = None
    gate: Literal["soft", "hard"] | None = None
    inclusive: bool | None = None
    gated: Literal["input", "norm"] | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        _check_sru(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n h w c"]:
        """Apply the unit. `train` is ignored."""
        del train
        gamma, beta = Norm(VARIANTS[self.variant], name="gn")(x.shape[-1])
        x = x if self.dtype is None else x.astype(self.dtype)
        return F.spatial_reconstruction(x, gamma, beta, **self.options())

    @nn.nowrap
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `functional.spatial_reconstruction`."""
        variant = VARIANTS[self.variant]
        names = ("groups", "epsilon", "unbiased", "gate", "inclusive", "gated")
        options = {name: getattr(variant if getattr(self, name) is None else self, name) for name in names}
        return {"threshold": self.threshold, "floor": variant.floor, **options}


class CRU(Layer):
    """Channel reconstruction unit: `(n, h, w, c)` to `(n, h, w, features)`; see `functional.channel_reconstruction`.

    Source: Li et al., CVPR 2023, Eqs. 5-9.

    Attributes:
        features: Channels of the output. If None, c.
        variant: "paper", "2023-07", "2023-09" or "2023-10". It sets `fuse` if that is None.
        alpha: α, the upper part's share of the channels, between 0 and 1; αc is rounded down.
        squeeze: r, the factor by which the 1×1 convolutions reduce the channels of both parts.
        conv_groups: g, groups of the group-wise convolution.
        kernel_size: k, kernel size of the group-wise convolution, odd.
        dilation: Dilation of the group-wise convolution.
        fuse: "pair" or "all".
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.

    Raises:
        TypeError: If an option is unknown, or another than `features` is given by position.
        ValueError: If a value is out of range, or the attributes do not fit the number of channels.
    """

    advice: ClassVar[Mapping[str, str]] = _KEEPS_SIZE

    features: int | None = None
    _: dataclasses.KW_ONLY
    variant: str = "paper"
    alpha: float = 0.5
    squeeze: int = 2
    conv_groups: int = 2
    kernel_size: int = 3
    dilation: int = 1
    fuse: Literal["pair", "all"] | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        _check_cru(self)
        super().__post_init__()
        check_odd(kernel_size=self.kernel_size)

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n h w d"]:
        """Apply the unit. `train` is ignored."""
        del train
        channels = x.shape[-1]
        features = self.features or channels
        split = CRUSplit(channels, features, self.alpha, self.squeeze, self.conv_groups)
        if problem := split.problem():
            raise ValueError(f"CRU: {problem} {split.suggestion()}")
        upper, lower, upper_squeezed, lower_squeezed = split.widths()
        rest = features - lower_squeezed

        window = (self.kernel_size, self.kernel_size)
        squeeze1 = _Kernel((1, 1, upper, upper_squeezed), name="squeeze1")
        squeeze2 = _Kernel((1, 1, lower, lower_squeezed), name="squeeze2")
        gwc = _Kernel((*window, upper_squeezed // self.conv_groups, features), use_bias=True, name="GWC")
        pwc1 = _Kernel((1, 1, upper_squeezed, features), name="PWC1")
        pwc2 = _Kernel((1, 1, lower_squeezed, rest), name="PWC2").kernel if rest else None
        arrays = promote_dtype(x, squeeze1.kernel, squeeze2.kernel, gwc.kernel, gwc.bias, pwc1.kernel, pwc2, dtype=self.dtype)
        return F.channel_reconstruction(*arrays, **self.options())

    @nn.nowrap
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `functional.channel_reconstruction`."""
        return {"conv_groups": self.conv_groups, "dilation": self.dilation, "fuse": self.fuse or VARIANTS[self.variant].fuse}


def _check_sru(module: SRU | ScConv) -> None:
    check_choice("variant", module.variant, VARIANTS)
    if module.gate is not None:
        check_choice("gate", module.gate, ("soft", "hard"))
    if module.gated is not None:
        check_choice("gated", module.gated, ("input", "norm"))


def _check_cru(module: CRU | ScConv) -> None:
    check_choice("variant", module.variant, VARIANTS)
    if module.fuse is not None:
        check_choice("fuse", module.fuse, ("pair", "all"))
    check_alpha(module.alpha)


class _Kernel(nn.Module):
    """The parameters of a convolution: kernel, and bias if `use_bias`."""

    shape: tuple[int, ...]
    use_bias: bool = False

    def setup(self) -> None:
        dtype = inherited(self, "param_dtype", jnp.float32)
        self.kernel = parameter(self, "kernel", inherited(self, "kernel_init", kaiming_normal), self.shape, dtype)
        if self.use_bias:
            self.bias = parameter(self, "bias", nn.initializers.zeros, self.shape[-1:], dtype)


class ScConv(Layer):
    """ScConv of 2023, a replacement for a 3×3 convolution: `(n, h, w, c)` to `(n, ⌈h / s⌉, ⌈w / s⌉, features)`.

    Source: Li et al., CVPR 2023, Eqs. 1-9.

    Call it as `layer(x)`. It has no batch norm, so it ignores `train`.

    Attributes:
        features: Channels of the output. If None, c.
        strides: s, strides of an average pool before the units. At the border it averages only pixels within the map.
        variant: "paper", "2023-07", "2023-09" or "2023-10" (see the module's docstring). It sets `groups`, `epsilon`,
            `unbiased`, `gate`, `inclusive`, `gated` and `fuse` if they are None.
        groups: Groups of the SRU's group norm.
        threshold: t, threshold of the SRU's gate.
        alpha: α, the CRU's share of upper channels, between 0 and 1.
        squeeze: r, the factor by which the CRU reduces the channels.
        conv_groups: g, groups of the CRU's group-wise convolution.
        kernel_size: k, kernel size of the CRU's group-wise convolution, odd.
        arrangement: "S+C" (SRU, then CRU), "C+S" (CRU, then SRU), "S&C" (the sum of both), "S" or "C" (one unit).
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        dilation: Dilation of the CRU's group-wise convolution.
        epsilon: ε of the SRU's group norm.
        unbiased: See `SRU`.
        gate: See `SRU`.
        inclusive: See `SRU`.
        gated: See `SRU`.
        fuse: See `CRU`.
        widen: How the channels change if `features` is not c: by a 1×1 convolution after the units ("projection"), or in the
            CRU's own last convolutions ("cru").

    Raises:
        ValueError: If a value is out of range, or the channels do not fit the units.
    """

    features: int | None = None
    _: dataclasses.KW_ONLY
    strides: int = 1
    variant: str = "paper"
    groups: int | None = None
    threshold: float = 0.5
    alpha: float = 0.5
    squeeze: int = 2
    conv_groups: int = 2
    kernel_size: int = 3
    arrangement: str = "S+C"
    dtype: Dtype | None = None
    dilation: int = 1
    epsilon: float | None = None
    unbiased: bool | None = None
    gate: Literal["soft", "hard"] | None = None
    inclusive: bool | None = None
    gated: Literal["input", "norm"] | None = None
    fuse: Literal["pair", "all"] | None = None
    widen: Literal["projection", "cru"] = "projection"

    def __post_init__(self) -> None:
        """Check the attributes."""
        check_choice("widen", self.widen, ("projection", "cru"))
        check_choice("arrangement", self.arrangement, ARRANGEMENTS)
        _check_sru(self)
        _check_cru(self)
        super().__post_init__()
        check_odd(kernel_size=self.kernel_size)

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n p q d"]:
        """Apply the operator. `train` is ignored."""
        del train
        if self.strides != 1:
            x = F.avg_pool(x, self.strides, ceil_mode=True, count_include_pad=False)

        sru = partial(
            SRU,
            variant=self.variant,
            groups=self.groups,
            threshold=self.threshold,
            epsilon=self.epsilon,
            unbiased=self.unbiased,
            gate=self.gate,
            inclusive=self.inclusive,
            gated=self.gated,
            dtype=self.dtype,
            name="SRU",
        )
        cru = partial(
            CRU,
            features=self.features if self.widen == "cru" else None,
            variant=self.variant,
            alpha=self.alpha,
            squeeze=self.squeeze,
            conv_groups=self.conv_groups,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            fuse=self.fuse,
            dtype=self.dtype,
            name="CRU",
        )
        match self.arrangement:
            case "S+C":
                y = cru()(sru()(x))
            case "C+S":
                y = sru()(cru()(x))
            case "S&C":
                y = sru()(x) + cru()(x)
            case "S":
                y = sru()(x)
            case _:
                y = cru()(x)
        if self.features not in (None, y.shape[-1]):
            y = Conv(self.features, 1, dtype=self.dtype, name="projection")(y)
        return y


@functools.cache
def scconv_factory(**options: Any) -> Factory:
    """Return a factory of `ScConv` with these options. It is cached, so that networks with equal options compare equal.

    Raises:
        ValueError: If a value is out of range.
    """
    ScConv(**options, parent=None)
    return partial(ScConv, **options)
