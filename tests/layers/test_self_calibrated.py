"""The self-calibrated layers by themselves: names, NNX, use in a network of one's own, and wrong input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from scconv_jax import SelfCalibratedConv, SelfCalibration, to_torch

X = jax.random.normal(jax.random.key(0), (2, 9, 14, 8))
KEY = jax.random.key(1)
PAPER = {"k1.0", "k1.1", "scconv.k2.1", "scconv.k2.2", "scconv.k3.0", "scconv.k3.1", "scconv.k4.0", "scconv.k4.1"}


def test_names_are_those_of_the_published_checkpoints():
    variables = SelfCalibratedConv(8).init(KEY, X, train=False)
    assert {name.rpartition(".")[0] for name in to_torch(variables)} == PAPER
    variables = SelfCalibration(8).init(KEY, X, train=False)
    branch = {name.removeprefix("scconv.") for name in PAPER if name.startswith("scconv")}
    assert {name.rpartition(".")[0] for name in to_torch(variables)} == branch


@pytest.mark.parametrize(
    ("options", "size"), [({}, (9, 14)), ({"strides": 2}, (5, 7)), ({"strides": 2, "dilation": 2}, (5, 7))], ids=str
)
@pytest.mark.parametrize("layer", [SelfCalibration, SelfCalibratedConv])
def test_output_shape(layer, options, size):
    y, _ = jax.eval_shape(lambda key, x: layer(8, **options).init_with_output(key, x, train=False), KEY, X)
    assert y.shape == (2, *size, 8)


def test_size_of_the_operator():
    """Four 3×3 kernels of C/2 → C/2 have as many weights as one of C → C: the paper's point."""
    variables = SelfCalibratedConv(8).init(KEY, X, train=False)
    kernels = [leaf.size for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    assert kernels == [9 * 4 * 4] * 4
    assert sum(kernels) == 9 * 8 * 8


def test_nnx():
    """Wrapped for NNX: the same parameters, the same outputs, in evaluation and in training."""
    layer = SelfCalibratedConv(8)
    wrapped = bridge.ToNNX(layer, rngs=nnx.Rngs(params=KEY)).lazy_init(X, train=False)
    variables = {
        "params": nnx.to_pure_dict(nnx.state(wrapped, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(wrapped, nnx.BatchStat)),
    }
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == jax.tree.map(jnp.shape, dict(layer.init(KEY, X, train=False)))
    np.testing.assert_allclose(wrapped(X, train=False), layer.apply(variables, X, train=False), atol=1e-6)

    expected, new = layer.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(wrapped(X, train=True, mutable=["batch_stats"]), expected, atol=1e-5)
    updated = nnx.to_pure_dict(nnx.state(wrapped, nnx.BatchStat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated, new["batch_stats"])


def test_nnx_gradients():
    layer = SelfCalibratedConv(8)
    wrapped = bridge.ToNNX(layer, rngs=nnx.Rngs(params=KEY)).lazy_init(X, train=False)
    gradients = nnx.grad(lambda module: jnp.sum(module(X, train=False) ** 2))(wrapped)
    leaves = jax.tree.leaves(nnx.to_pure_dict(gradients))
    assert len(leaves) == 12
    assert all(jnp.abs(leaf).max() > 0 for leaf in leaves)


def test_in_a_network_of_ones_own():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            x = nn.Conv(16, (3, 3), padding=1)(x)
            x = nn.relu(SelfCalibratedConv(16, strides=2)(x, train=train))
            x = nn.relu(SelfCalibratedConv(16, pooling=2)(x, train=train))
            return nn.Dense(3)(x.mean(axis=(1, 2)))

    model = Network()
    variables = model.init(KEY, X, train=False)
    logits, new = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, X)
    assert logits.shape == (2, 3)
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_another_norm():
    """`norm` is any factory called as `norm(dtype=..., name=...)(x, train=...)`."""

    class GroupNorm(nn.Module):
        dtype: object = None

        @nn.compact
        def __call__(self, x, *, train: bool):
            del train
            return nn.GroupNorm(num_groups=2, dtype=self.dtype)(x)

    variables = SelfCalibratedConv(8, norm=GroupNorm).init(KEY, X, train=False)
    assert set(variables) == {"params"}


@pytest.mark.parametrize("features", [7, 9])
def test_odd_channels(features):
    with pytest.raises(ValueError, match=rf"{features} is odd.*{features - 1} or {features + 1}"):
        SelfCalibratedConv(features).init(KEY, jnp.zeros((1, 8, 8, features)), train=False)


@pytest.mark.parametrize("layer", [SelfCalibration, SelfCalibratedConv])
def test_other_channels_than_the_inputs(layer):
    with pytest.raises(ValueError, match=r"features=16.*channels, 8"):
        layer(16).init(KEY, X, train=False)


@pytest.mark.parametrize("layer", [SelfCalibration, SelfCalibratedConv])
@pytest.mark.parametrize("pooling", [4, 5])
def test_map_smaller_than_the_pool(layer, pooling):
    with pytest.raises(ValueError, match=rf"at least {pooling} px.*got {pooling - 1}×14"):
        layer(8, pooling=pooling).init(KEY, X[:, : pooling - 1], train=False)


def test_groups_that_do_not_divide_a_half():
    with pytest.raises(ValueError, match=r"groups=3.*4 and 4\. Nearest valid values: 2 and 4\."):
        SelfCalibratedConv(8, groups=3).init(KEY, X, train=False)


def test_pooling_that_is_none():
    with pytest.raises(ValueError, match=r"pooling=0 must be one positive integer\."):
        SelfCalibratedConv(8, pooling=0).init(KEY, X, train=False)


def test_train_has_no_default():
    with pytest.raises(TypeError, match="train"):
        SelfCalibratedConv(8).init(KEY, X)
