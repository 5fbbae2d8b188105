"""`functional.scconv` is the layer `ScConv`, and the defaults of the functions are those of the layers."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scconv_jax
from scconv_jax import functional as F
from scconv_jax.layers import VARIANTS

X = jax.random.normal(jax.random.key(1), (2, 7, 6, 16))
OPTIONS = ("groups", "epsilon", "unbiased", "gate", "inclusive", "gated", "fuse", "floor")
LAYER_OF = {
    "scconv": scconv_jax.ScConv,
    "spatial_reconstruction": scconv_jax.SRU,
    "channel_reconstruction": scconv_jax.CRU,
    "self_calibration": scconv_jax.SelfCalibration,
    "self_calibrated_conv": scconv_jax.SelfCalibratedConv,
}


@pytest.mark.parametrize("name", LAYER_OF)
def test_defaults_are_those_of_the_layer(name):
    """An option that the layer leaves to its variant has the paper's value."""
    ours = {p.name: p.default for p in inspect.signature(getattr(F, name)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    fields = {p.name: p.default for p in inspect.signature(LAYER_OF[name]).parameters.values()}
    paper = VARIANTS["paper"]
    expected = {option: fields.get(option) if fields.get(option) is not None else getattr(paper, option) for option in ours}
    assert ours == expected
    assert ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "2023-07"},
        {"variant": "2023-09", "arrangement": "C+S"},
        {"variant": "2023-10", "arrangement": "S&C"},
        {"features": 32, "strides": 2, "alpha": 0.75, "dilation": 2, "groups": 8},
    ],
)
def test_the_function_is_the_layer(options):
    layer = scconv_jax.ScConv(**options)
    variables = layer.init(jax.random.key(0), X)
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
    cru, (gamma, beta) = params["CRU"], [params["SRU"]["gn"][name] for name in VARIANTS[layer.variant].norm_names]
    chosen = {option: getattr(VARIANTS[layer.variant], option) for option in OPTIONS}
    chosen |= {option: options[option] for option in ("groups", "strides", "dilation", "arrangement") if option in options}
    found = F.scconv(
        X,
        gamma.reshape(-1),
        beta.reshape(-1),
        cru["squeeze1"]["kernel"],
        cru["squeeze2"]["kernel"],
        cru["GWC"]["kernel"],
        cru["GWC"]["bias"],
        cru["PWC1"]["kernel"],
        cru["PWC2"]["kernel"],
        params.get("projection", {}).get("kernel"),
        **chosen,
    )
    np.testing.assert_array_equal(found, layer.apply({"params": params}, X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrangement": "S"}, "Unknown arrangement 'S'."),
        ({"strides": 0}, "strides=0 must be one positive integer."),
        ({"groups": 5}, "groups=5 must divide the channels, 16."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_it_refuses(options, message):
    vector = jnp.ones(16)
    kernels = [
        jnp.ones((1, 1, 8, 4)),
        jnp.ones((1, 1, 8, 4)),
        jnp.ones((3, 3, 2, 16)),
        vector,
        jnp.ones((1, 1, 4, 16)),
        jnp.ones((1, 1, 4, 12)),
    ]
    with pytest.raises(ValueError, match=re.escape(message)):
        F.scconv(X, vector, vector, *kernels, **options)
    with pytest.raises(ValueError, match="scconv: expected maps of shape"):
        F.scconv(X[0], vector, vector, *kernels)
