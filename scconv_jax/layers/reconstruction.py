"""Spatial and channel reconstruction convolution (ScConv): SRU, then CRU.

Paper: Li, Wen, He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023, pp. 6153-6162,
DOI 10.1109/CVPR52729.2023.00596. Its authors published no code; what people use is https://github.com/cheng-haha/ScConv, in three
versions that differ from the paper and from each other. All are here, as `variant`:

    variant    group norm              γ at first  gate at t            gates    softmax over      groups
    paper      √(σ² + 1e-5)            1           W > t: 1, else W     X        pair (Eq. 8)      4
    2023-07    unbiased σ + 1e-10      normal      W >= t: 1, else 0    X        all channels      16
    2023-09    unbiased σ + 1e-10      normal      W >= t: 1, else 0    GN(X)    all channels      4
    2023-10    √(σ² + 1e-5)            1           W > t: 1, else W     X        all channels      4

What they do, and which to choose:

- "paper" for new networks: the output has the scale of the convolution it stands in for. γ and β learn through the weights W
  that are at or below t.
- "2023-10" for checkpoints of the last public code. The softmax over all 2C averages makes the output about C times smaller,
  which a norm after it makes up for; γ and β learn as above.
- "2023-09": as small. γ and β learn, since GN(X) itself passes on.
- "2023-07": as small. The gate is a step and what it passes is X: γ and β get no gradient at all, and stay as they were drawn.

The weights are γ / Σγ. A γ whose sum is near zero, which one drawn from a normal can have, makes them huge and the gate a
step; "paper" starts at γ = 1 and does not let |Σγ| fall below 1e-6, so that its output is always finite. Where all values of a
group are equal, GN(X) is β, and with β = 0 every W is 0.5: not above t = 0.5, but not below it either ("2023-07"
and "2023-09" count it as informative).

Differences from the paper, which leaves these open: the number of groups and ε of the norm; weights at or below t are kept (as in
the last public code); strides are an average pool before the units, and a 1×1 convolution follows where the channels change; the
parallel arrangement adds both units' outputs.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_odd, check_whole
from scconv_jax.layers.core import Conv, Dtype, Factory, kaiming_normal
from scconv_jax.layers.variants import ARRANGEMENTS, VARIANTS, Parts, Variant, check_alpha, check_choice
from scconv_jax.shapes import Array, Float


class Norm(nn.Module):
    """The parameters γ and β of a group norm, under the names and in the shapes that the variant's checkpoints have."""

    variant: Variant

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Return γ and β, each `(channels,)`."""
        shape = (channels, *[1] * self.variant.norm_axes)
        gamma, beta = self.variant.norm_names
        return (
            self.param(gamma, self.variant.norm_init, shape, jnp.float32).reshape(channels),
            self.param(beta, nn.initializers.zeros, shape, jnp.float32).reshape(channels),
        )


class SRU(nn.Module):
    """Spatial reconstruction unit: `(n, h, w, c)` to the same shape; see `functional.spatial_reconstruction`.

    Attributes:
        variant: "paper", "2023-07", "2023-09" or "2023-10": sets what is not given below.
        groups: of the group norm; must divide c, which must be even.
        threshold: t, of the gate.
        epsilon: of the group norm.
        unbiased: whether the group norm divides by the unbiased standard deviation.
        gate: "soft" or "hard".
        inclusive: whether a weight equal to t is informative.
        gated: "input" or "norm".
        dtype: of the result; where not given, that of `x`. Statistics and gate are computed in float32 at least.

    Raises:
        ValueError: for a variant that does not exist, an odd c, or `groups` that do not divide it.
    """

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
        """Check what can be checked without an input."""
        check_choice("variant", self.variant, VARIANTS)
        if self.gate is not None:
            check_choice("gate", self.gate, ("soft", "hard"))
        if self.gated is not None:
            check_choice("gated", self.gated, ("input", "norm"))
        check_whole(groups=self.groups)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n h w c"]:
        """Reconstruct; `train` changes nothing."""
        del train
        variant = VARIANTS[self.variant]
        gamma, beta = Norm(variant, name="gn")(x.shape[-1])
        options = {
            name: getattr(variant, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("groups", "epsilon", "unbiased", "gate", "inclusive", "gated")
        }
        x = x if self.dtype is None else x.astype(self.dtype)
        return F.spatial_reconstruction(x, gamma, beta, threshold=self.threshold, floor=variant.floor, **options)


class CRU(nn.Module):
    """Channel reconstruction unit: `(n, h, w, c)` to `(n, h, w, features)`; see `functional.channel_reconstruction`.

    Attributes:
        features: channels of the output; where not given, c.
        variant: "paper", "2023-07", "2023-09" or "2023-10": sets `fuse` where that is not given.
        alpha: α, share of the channels that are transformed richly; between 0 and 1, rounded down to whole channels.
        squeeze: r, by which the channels of both parts are divided.
        conv_groups: g, of the group-wise convolution.
        kernel_size: k, of the group-wise convolution, odd.
        dilation: of the group-wise convolution.
        fuse: "pair" or "all".
        dtype: of the computation; where not given, what `x` and the parameters promote to.

    Raises:
        ValueError: for a value out of its range, or channels that it does not divide.
    """

    features: int | None = None
    variant: str = "paper"
    alpha: float = 0.5
    squeeze: int = 2
    conv_groups: int = 2
    kernel_size: int = 3
    dilation: int = 1
    fuse: Literal["pair", "all"] | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without an input."""
        check_choice("variant", self.variant, VARIANTS)
        if self.fuse is not None:
            check_choice("fuse", self.fuse, ("pair", "all"))
        check_alpha(self.alpha)
        check_odd(kernel_size=self.kernel_size)
        check_whole(features=self.features, squeeze=self.squeeze, conv_groups=self.conv_groups, dilation=self.dilation)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n h w d"]:
        """Reconstruct; `train` changes nothing."""
        del train
        channels = x.shape[-1]
        features = self.features or channels
        parts = Parts(channels, features, self.alpha, self.squeeze, self.conv_groups)
        if reason := parts.misfit():
            raise ValueError(f"CRU: {reason} {parts.remedy()}")
        upper, lower, upper_squeezed, lower_squeezed = parts.widths()
        rest = features - lower_squeezed

        window = (self.kernel_size, self.kernel_size)
        squeeze1 = _Kernel((1, 1, upper, upper_squeezed), name="squeeze1")
        squeeze2 = _Kernel((1, 1, lower, lower_squeezed), name="squeeze2")
        gwc = _Kernel((*window, upper_squeezed // self.conv_groups, features), use_bias=True, name="GWC")
        pwc1 = _Kernel((1, 1, upper_squeezed, features), name="PWC1")
        pwc2 = _Kernel((1, 1, lower_squeezed, rest), name="PWC2").kernel if rest else None
        arrays = promote_dtype(x, squeeze1.kernel, squeeze2.kernel, gwc.kernel, gwc.bias, pwc1.kernel, pwc2, dtype=self.dtype)
        return F.channel_reconstruction(
            *arrays,
            conv_groups=self.conv_groups,
            dilation=self.dilation,
            fuse=self.fuse or VARIANTS[self.variant].fuse,
        )


class _Kernel(nn.Module):
    """The kernel of a convolution, and its bias where it has one, for a function that applies several."""

    shape: tuple[int, ...]
    use_bias: bool = False

    def setup(self) -> None:
        self.kernel = self.param("kernel", kaiming_normal, self.shape, jnp.float32)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)


class ScConv(nn.Module):
    """The whole operator: `(n, h, w, c)` to `(n, h / strides, w / strides, features)`; stands in for a 3×3 convolution.

    Called `layer(x)`: it has no batch norm, and `train`, which it takes as other layers do, changes nothing.

    Attributes:
        features: channels of the output; where not given, c.
        strides: of an average pool before the units, whose windows at the border average the pixels they have; maps of h
            by w become ⌈h / strides⌉ by ⌈w / strides⌉, as by a 3×3 convolution.
        variant: "paper", "2023-07", "2023-09" or "2023-10" (see the module's docstring): sets what is not given below.
        groups: of the SRU's group norm.
        threshold: t, of the SRU's gate.
        alpha: α, share of the channels that the CRU transforms richly, between 0 and 1.
        squeeze: r, by which the CRU divides the channels.
        conv_groups: g, of the CRU's group-wise convolution.
        kernel_size: k, of the CRU's group-wise convolution, odd.
        arrangement: "S+C" the SRU, then the CRU; "C+S" the other way round; "S&C" both on the input, added; "S" and "C" one
            alone.
        dtype: of the computation; where not given, what `x` and the parameters promote to.
        dilation: of the group-wise convolution.
        epsilon: of the SRU's group norm.
        unbiased: see `SRU`; so for `gate`, `inclusive` and `gated`.
        gate: see there.
        inclusive: see there.
        gated: see there.
        fuse: see `CRU`.
        widen: how `features` come about where they are not c: by "projection", a 1×1 convolution after the units, or by "cru",
            whose own last convolutions can have another number of outputs than inputs.

    Raises:
        ValueError: for a value out of its range, or channels that it does not divide.
    """

    features: int | None = None
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
        """Check what can be checked without an input."""
        check_choice("variant", self.variant, VARIANTS)
        check_choice("widen", self.widen, ("projection", "cru"))
        check_choice("arrangement", self.arrangement, ARRANGEMENTS)
        check_alpha(self.alpha)
        check_whole(features=self.features, strides=self.strides)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n p q d"]:
        """Apply the operator; `train` changes nothing."""
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
    """Make a factory of `ScConv` with these options: the same for the same, so that networks made alike are equal.

    Raises:
        ValueError: for a value out of its range, here and not only where the network is first called.
    """
    ScConv(**options, parent=None)
    return partial(ScConv, **options)
