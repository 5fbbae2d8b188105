"""A whole network with weights in NNX: evaluation, training, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import scconv_jax
from scconv_jax.models import BasicBlock, ResNet

MODEL = ResNet(BasicBlock, (1, 1), planes=(4, 8), output_stride=8, num_classes=3, dropout=0.5)
X = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))


@pytest.fixture(scope="module")
def variables():
    found = jax.jit(lambda key: MODEL.init(key, X, train=False))(jax.random.key(0))
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.1), found)  # NumPy, as from a file, and no initial values


def test_the_network_has_its_weights(variables):
    module = scconv_jax.to_nnx(MODEL, variables)
    np.testing.assert_array_equal(module(X, train=False), MODEL.apply(variables, X, train=False))
    back = scconv_jax.from_nnx(module)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert module.layer1["0"]["conv1"]["kernel"].shape == (3, 3, 64, 4)


def test_training_under_jit(variables):
    module = scconv_jax.to_nnx(MODEL, variables, nnx.Rngs(dropout=0))
    optimizer = nnx.Optimizer(module, optax.sgd(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        def loss_of(module):
            return jnp.square(module(X, train=True, mutable=["batch_stats"])).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(module)
        optimizer.update(module, gradients)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(2)]
    assert losses[0] != losses[1]
    after = scconv_jax.from_nnx(module)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, variables)
    assert moved["batch_stats"]["bn1"] == {"mean": True, "var": True}
    assert moved["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(module(X, train=False), MODEL.apply(after, X, train=False))


def test_variables_without_params():
    with pytest.raises(ValueError, match=r"Variables are \{'params'.*; got batch_stats\."):
        scconv_jax.to_nnx(MODEL, {"batch_stats": {}})
