"""The layers by themselves: what PyTorch has no counterpart for, and what they say to wrong input."""

import re
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from scconv_jax import GhostConv, layers

X = jax.random.normal(jax.random.key(0), (8, 5, 7, 6)) * jnp.arange(1, 9.0)[:, None, None, None] + 3
VARIABLES = {
    "params": {"scale": jnp.linspace(-1, 2, 6), "bias": jnp.linspace(0, 1, 6)},
    "batch_stats": {"mean": jnp.linspace(1, 2, 6), "var": jnp.linspace(0.5, 3, 6)},
}


def train_step(layer, x):
    """Output, running statistics, and the gradient of a function of the output to the input and the parameters."""

    def loss(params, x):
        y, new = layer.apply({**VARIABLES, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, new["batch_stats"])

    (_, (y, new)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(VARIABLES["params"], x)
    return y, new, gradients


def assert_equal_to_whole_batch(y, new, x_gradient) -> None:
    expected, expected_new, (_, expected_gradient) = train_step(layers.BatchNorm(), X)
    np.testing.assert_allclose(y.reshape(X.shape), expected, atol=2e-5)
    for key, value in expected_new.items():
        np.testing.assert_allclose(new[key], jnp.broadcast_to(value, new[key].shape), rtol=1e-5)
    np.testing.assert_allclose(x_gradient.reshape(X.shape), expected_gradient, atol=2e-5)


def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch():
    layer = layers.BatchNorm(axis_name="devices")
    y, new, (_, gradient) = jax.vmap(partial(train_step, layer), axis_name="devices")(X.reshape(4, 2, 5, 7, 6))
    assert_equal_to_whole_batch(y, new, gradient)


def test_batch_norm_over_real_devices_is_that_of_the_whole_batch():
    """Eight devices with an image each; in place of one, which knows only its own statistics."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("devices",))
    layer = layers.BatchNorm(axis_name="devices")
    rows = PartitionSpec("devices")

    def forward(x):
        y, new = layer.apply(VARIABLES, x, train=True, mutable=["batch_stats"])
        return y, new["batch_stats"]

    y, new = jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=rows, out_specs=(rows, PartitionSpec())))(X)
    expected, expected_new, _ = train_step(layers.BatchNorm(), X)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    for key, value in expected_new.items():
        np.testing.assert_allclose(new[key], value, rtol=1e-5)


def test_batch_norm_without_an_axis_keeps_to_itself():
    halves = jax.vmap(partial(train_step, layers.BatchNorm()))(X.reshape(2, 4, 5, 7, 6))
    whole = train_step(layers.BatchNorm(), X)
    assert np.abs(halves[0].reshape(X.shape) - whole[0]).max() > 0.1


def test_batch_norm_in_evaluation_changes_nothing():
    _, new = layers.BatchNorm().apply(VARIABLES, X, train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, new.get("batch_stats", VARIABLES["batch_stats"]), VARIABLES["batch_stats"])


def test_batch_norm_at_birth_has_seen_nothing():
    variables = layers.BatchNorm().init(jax.random.key(0), X, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_batch_norm_of_one_value():
    with pytest.raises(ValueError, match=r"more than one value.*\(1, 1, 1, 6\).*larger"):
        layers.BatchNorm().apply(VARIABLES, X[:1, :1, :1], train=True, mutable=["batch_stats"])


def test_batch_norm_of_a_constant():
    """No variance: the output is the bias, and nothing is divided by zero, forward or backward."""
    y, new, gradients = train_step(layers.BatchNorm(), jnp.full((2, 3, 3, 6), 2.5))
    np.testing.assert_allclose(y, jnp.broadcast_to(VARIABLES["params"]["bias"], y.shape), atol=1e-3)
    np.testing.assert_allclose(new["var"], 0.9 * VARIABLES["batch_stats"]["var"], rtol=1e-6)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_batch_norm_train_has_no_default():
    with pytest.raises(TypeError, match="train"):
        layers.BatchNorm().apply(VARIABLES, X)


@pytest.mark.parametrize(("features", "groups"), [(12, 4), (8, 3)])
def test_groups_that_do_not_divide(features, groups):
    with pytest.raises(ValueError, match=rf"groups={groups} must divide the channels of input and output, 6 and {features}\."):
        layers.Conv(features, 3, groups=groups).init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "kernel_size=2 must be odd, so that the kernel has a centre. Use 1 or 3."),
        ({"cheap_size": 4}, "cheap_size=4 must be odd, so that the kernel has a centre. Use 3 or 5."),
        ({"strides": 0}, "strides=0 must be one positive integer."),
    ],
)
def test_what_a_ghost_convolution_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GhostConv(6, **options).init(jax.random.key(0), X)


def test_parameters_stay_float32():
    variables = layers.ConvNorm(4, dtype=jnp.bfloat16).init(jax.random.key(0), X.astype(jnp.bfloat16), train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert set(variables["params"]) == {"0", "1"}


def test_parameters_that_exist_are_not_made_anew():
    """Flax would trace the initialiser in each call."""
    made = []

    def init(_key, shape, dtype):
        made.append(shape)
        return jnp.ones(shape, dtype)

    conv, x = layers.Conv(2, 1, kernel_init=init), jnp.ones((1, 2, 2, 3))
    made.clear()  # the layer has tried the initialiser
    variables = conv.init(jax.random.key(0), x)
    assert made == [(1, 1, 3, 2)]
    np.testing.assert_array_equal(conv.apply(variables, x), jnp.full((1, 2, 2, 2), 3.0))
    assert made == [(1, 1, 3, 2)]


def test_parameters_of_another_shape_are_refused():
    variables = {"params": {"kernel": jnp.ones((1, 1, 3, 4))}}
    with pytest.raises(flax.errors.ScopeParamShapeError, match=re.escape("(1, 1, 3, 4)")):
        layers.Conv(2, 1).apply(variables, jnp.ones((1, 2, 2, 3)))


def test_norms_of_one_shape_are_traced_once():
    norm, x = layers.BatchNorm(), jnp.ones((2, 2, 2, 3))
    variables = norm.init(jax.random.key(0), x, train=False)

    def twice(variables, x):
        y, _ = norm.apply(variables, x, train=True, mutable="batch_stats")
        return norm.apply(variables, y, train=True, mutable="batch_stats")

    calls = [eqn.params["jaxpr"] for eqn in jax.make_jaxpr(twice)(variables, x).eqns if "jaxpr" in eqn.params]
    assert len(calls) == 2
    assert calls[0] is calls[1]
