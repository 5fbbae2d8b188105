"""Networks under `jax.export` with symbolic batch, height and width."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import scconv_jax
from scconv_jax.models.registry import MODELS

RESIDUAL = {"stage_sizes": (1, 1), "planes": (16, 16), "output_stride": 8}
FAMILIES = {  # attributes that make the network small
    "scnet50_v1d": RESIDUAL,
    "se_scnet50": RESIDUAL,
    "scconv_resnet50": RESIDUAL,
    "ghost_resnet50": RESIDUAL,
    "densenet121_small": {"block_sizes": (1, 1), "growth": 8},
    "wrn28_10_small": {"depth": 10, "width": 1},
}


def short(name):
    """Returns a network with two blocks of each kind, the one that changes the size of maps and the one that keeps it."""
    model = scconv_jax.create_model(name)
    if hasattr(model, "stage_sizes"):
        return model.clone(stage_sizes=(2, 1), planes=model.planes[:2], output_stride=2 * model.stem_stride)
    if hasattr(model, "block_sizes"):
        return model.clone(block_sizes=(2, 1))
    return model.clone(depth=10) if hasattr(model, "depth") else model


SHORT = {name: model for model, name in {short(name): name for name in MODELS}.items()}
"""Short networks by name. Those that differ in the number of blocks alone are one."""
SIZES = ((32, 64), (96, 32))


def exported(model, variables, constraints=(), **options):
    shape = export.symbolic_shape("n, 32*h, 32*w, 3", constraints=list(constraints))
    return export.export(jax.jit(partial(model.apply, **options)))(variables, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("name", [*FAMILIES, "ghostnet_100"])
@pytest.mark.usefixtures("short_ghostnet")
def test_one_program_for_all_sizes_equals_the_plain_call(name):
    model = scconv_jax.create_model(name).clone(**FAMILIES.get(name, {}))
    images = [jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 3)), jnp.float32) for size in SIZES]
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images[0])
    program = exported(model, variables, train=False)
    for batch in images:
        plain = jax.jit(partial(model.apply, train=False))(variables, batch)
        np.testing.assert_allclose(program.call(variables, batch), plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", SHORT)
@pytest.mark.usefixtures("short_ghostnet")
def test_every_network_exports(name, train):
    model = SHORT[name]
    images = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.eval_shape(jax.random.key, 0), images)
    options = {"mutable": ["batch_stats"]} if train else {}
    exported(model, variables, ["n >= 2", "h >= 4", "w >= 4"], train=train, **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("n, 32*h, 224, 3", r"The symbolic size 32\*h may be below 97, .* jax\.export\.symbolic_shape the constraint 'h >= 4'\."),
        ("n, 8*h, 224, 3", r"The symbolic size 8\*h must be a multiple of 32 here\. .* give .* the size as 32\*h\."),
        ("n, 224, w, 3", r"The symbolic size w must be a multiple of 32 here\. .* give .* the size as 32\*w\."),
    ],
)
def test_an_error_says_what_to_give(shape, message):
    images = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    with pytest.raises(ValueError, match=message):
        export.export(jax.jit(partial(scconv_jax.create_model("scnet50").init, train=False)))(jax.random.key(0), images)
