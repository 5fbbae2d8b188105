"""State dicts of the PyTorch oracles, over and back."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from scconv_jax import ConversionError, SelfCalibratedConv, SelfCalibration, create_model, from_torch, layers, to_torch
from tests.reference import scnet
from tests.reference.networks import NETWORKS, build
from tests.reference.state import randomise

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")

# Random numbers for many kernels take LLVM half a minute to optimise.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def template_of(model, *shape: int):
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros(shape))


def assert_same_state_dict(found, expected) -> None:
    """Same names, shapes, dtypes and values; only BatchNorm's counter of steps starts again."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == tuple(value.shape), name
        assert found[name].dtype == value.numpy().dtype, name
        assert found[name].flags.c_contiguous, name  # safetensors would write another array's bytes
        if name.endswith("num_batches_tracked"):
            assert found[name] == 0
        else:
            np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)


LAYERS = {
    "Conv": (layers.Conv(4, 3, use_bias=True), nn.Conv2d(6, 4, 3)),
    "BatchNorm": (layers.BatchNorm(), nn.BatchNorm2d(6)),
    "SelfCalibration": (SelfCalibration(6), scnet.SelfCalibration(6)),
    "SelfCalibratedConv": (SelfCalibratedConv(6), scnet.SelfCalibratedConv(6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone(name):
    layer, oracle = LAYERS[name]
    state_dict = randomise(oracle, 0).state_dict()
    found = to_torch(from_torch(state_dict, template_of(layer, 1, 8, 8, 6)))
    assert_same_state_dict(found, state_dict)


# The deeper twins have no names of another kind, and are converted strictly wherever their outputs are compared.
@pytest.mark.parametrize("name", [name for name in NETWORKS if "101" not in name])
def test_a_network_over_and_back(name):
    oracle = randomise(build(name, num_classes=7), 0)
    state_dict = oracle.state_dict()
    model = create_model(name, num_classes=7)
    template = template_of(model, 1, 97, 97, 3)
    variables = from_torch(state_dict, template)
    assert jax.tree.structure(variables) == jax.tree.structure(template)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, template)
    found = to_torch(variables)
    assert_same_state_dict(found, state_dict)
    again = from_torch(found, template)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    oracle.load_state_dict({key: torch.from_numpy(value) for key, value in found.items()}, strict=True)


@pytest.fixture(scope="module")
def small():
    oracle = randomise(build("scnet20_small"), 0)
    return oracle, template_of(create_model("scnet20_small"), 1, 13, 13, 3)


def test_our_own_initial_variables_load_into_pytorch(small):
    _, template = small
    model = create_model("scnet20_small")
    variables = quick_jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, 13, 13, 3)))
    assert jax.tree.structure(variables) == jax.tree.structure(template)
    state_dict = to_torch(variables)
    fresh = build("scnet20_small")
    fresh.load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()}, strict=True)
    jax.tree.map(np.testing.assert_array_equal, from_torch(fresh.state_dict(), variables), variables)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda entries: {"state_dict": entries},
        lambda entries: {f"module.{key}": value for key, value in entries.items()},
        lambda entries: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in entries.items()}},
        lambda entries: {key: value.numpy() for key, value in entries.items()},
        lambda entries: {key: value for key, value in entries.items() if not key.endswith("num_batches_tracked")},
        lambda entries: dict(reversed(entries.items())),
        lambda entries: {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in entries.items()},
    ],
    ids=["wrapped", "DataParallel", "both", "numpy", "old PyTorch", "another order", "parameters"],
)
def test_the_forms_that_files_come_in(small, wrap):
    oracle, template = small
    expected = from_torch(oracle.state_dict(), template)
    jax.tree.map(np.testing.assert_array_equal, from_torch(wrap(oracle.state_dict()), template), expected)


def test_bfloat16_tensors(small):
    oracle, template = small
    entries = {k: v.bfloat16() if v.is_floating_point() else v for k, v in oracle.state_dict().items()}
    variables = from_torch(entries, template)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(ml_dtypes.bfloat16)}
    expected = from_torch({k: v.float() for k, v in entries.items()}, template)
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours.astype(np.float32), theirs), variables, expected)


def test_another_network_is_refused_and_every_difference_named(small):
    _, template = small
    with pytest.raises(ConversionError) as error:
        from_torch(build("resnet20_small").state_dict(), template)
    for name in ("layer1.0.conv2.weight", "layer3.1.scconv.k4.1.running_var"):
        assert name in str(error.value)


def test_a_head_of_another_size_is_refused_or_left(small):
    oracle, _ = small
    model = create_model("scnet20_small", num_classes=3)
    variables = quick_jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, 13, 13, 3)))
    with pytest.raises(ConversionError, match=r"fc\.weight.*\(10, 256\).*\(3, 256\)"):
        from_torch(oracle.state_dict(), variables)
    loaded = from_torch(oracle.state_dict(), variables, ignore=["fc.*"])
    np.testing.assert_array_equal(loaded["params"]["fc"]["kernel"], variables["params"]["fc"]["kernel"])
    np.testing.assert_array_equal(to_torch(loaded)["conv1.weight"], oracle.state_dict()["conv1.weight"].numpy())
