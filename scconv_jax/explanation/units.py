"""What the SRU and the CRU compute on the way to their results, given a bound unit and its input.

Paper: Li, Wen, He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023, pp. 6153-6162,
Eqs. 1-3 and 5-8. Each variant's own rules hold.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax.linen.dtypes import promote_dtype

from scconv_jax import functional as F
from scconv_jax.layers.reconstruction import CRU, SRU
from scconv_jax.layers.variants import VARIANTS


class Separation(NamedTuple):
    """The two maps into which an SRU separates its input, each `(n, h, w, c)` (Li et al., CVPR 2023, Eqs. 2-3)."""

    informative: jax.Array
    """W1 · X, or W1 · GN(X) in the variant "2023-09"."""
    redundant: jax.Array
    """W2 · X, or W2 · GN(X)."""


def separate(sru: SRU, x: jax.Array) -> Separation:
    """Return W1 · X and W2 · X."""
    norm = sru.variables["params"]["gn"]
    gamma, beta = (norm[name].reshape(-1) for name in VARIANTS[sru.variant].norm_names)
    return Separation(*F.spatial_separation(x if sru.dtype is None else x.astype(sru.dtype), gamma, beta, **sru.options()))


def channel_weights(cru: CRU, x: jax.Array) -> jax.Array:
    """Return β1 and β2, `(n, 2, c)`."""
    params = cru.variables["params"]
    kernels = (params[name]["kernel"] if name in params else None for name in ("squeeze1", "squeeze2", "GWC", "PWC1", "PWC2"))
    squeeze1, squeeze2, gwc, pwc1, pwc2 = kernels
    arrays = promote_dtype(x, squeeze1, squeeze2, gwc, params["GWC"]["bias"], pwc1, pwc2, dtype=cru.dtype)
    return F.channel_weights(*arrays, **cru.options())
