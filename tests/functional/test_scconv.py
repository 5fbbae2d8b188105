"""`functional.scconv` is the layer `ScConv`, and the defaults of the functions are those of the layers."""

import inspect
import math
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
        ({"gate": "sharp"}, "Unknown gate 'sharp'."),
        ({"gated": "output"}, "Unknown gated 'output'."),
        ({"fuse": "none"}, "Unknown fuse 'none'."),
        ({"threshold": math.nan}, "threshold=nan must be a number."),
        ({"epsilon": -1}, "epsilon=-1 must be 0 or a positive number. Nearest valid value: 0."),
        ({"conv_groups": 3}, "conv_groups=3 must divide the channels of squeeze1's output and of gwc's, 4 and 16."),
        ({"conv_groups": 1}, "gwc must have the shape (3, 3, 4, 16), to which the other kernels lead; got (3, 3, 2, 16)."),
        ({"dilation": 0}, "dilation=0 must be one positive integer."),
        ({"gamma": jnp.ones(8)}, "gamma must have one value for each of the 16 channels of x, (16,); got (8,)."),
        ({"pwc2": None}, "pwc2 must have the shape (1, 1, 4, 12), to which the other kernels lead; got None."),
        ({"squeeze1": jnp.ones((1, 1, 6, 4))}, "squeeze1 and squeeze2 take 6 and 8 channels; their sum must be those of x, 16."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_it_refuses(options, message):
    vector = jnp.ones(16)
    shapes = {
        "squeeze1": (1, 1, 8, 4),
        "squeeze2": (1, 1, 8, 4),
        "gwc": (3, 3, 2, 16),
        "pwc1": (1, 1, 4, 16),
        "pwc2": (1, 1, 4, 12),
    }
    kernels = {name: jnp.ones(shape) for name, shape in shapes.items()} | {"gwc_bias": vector, "gamma": vector, "beta": vector}
    with pytest.raises(ValueError, match=re.escape(message)):
        F.scconv(X, **(kernels | options))
    with pytest.raises(ValueError, match="scconv: expected maps of shape"):
        F.scconv(X[0], **kernels)


@pytest.mark.usefixtures("unchecked")
def test_what_conv_refuses():
    with pytest.raises(ValueError, match=re.escape("padding='SAME' must be one number, the zeros on each side")):
        F.conv(X, jnp.ones((3, 3, 16, 16)), padding="SAME")
    with pytest.raises(ValueError, match=re.escape("strides=(2, 2) must be one positive integer.")):
        F.conv(X, jnp.ones((3, 3, 16, 16)), strides=(2, 2))
    with pytest.raises(ValueError, match=re.escape("Kernels are (kh, kw, i, o): PyTorch's are (o, i, kh, kw).")):
        F.conv(X, jnp.ones((16, 16, 3, 3)))
