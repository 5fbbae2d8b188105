"""A whole network with weights in NNX: evaluation, training, and back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
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


@pytest.mark.usefixtures("unchecked")
def test_modes_of_nnx(variables):
    """`eval()` and `train()` of a module around the network decide where a call does not; training keeps its statistics."""

    class Net(nnx.Module):
        def __init__(self):
            self.backbone = scconv_jax.to_nnx(MODEL.clone(dropout=0.0), variables)

        def __call__(self, x):
            return self.backbone(x)

    net = Net()
    with pytest.raises(TypeError, match="train"):
        net(X)
    net.eval()
    np.testing.assert_array_equal(net(X), MODEL.apply(variables, X, train=False))
    graph, state = nnx.split(net)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X), net(X))
    net.train()
    trained, new = MODEL.clone(dropout=0.0).apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(net(X), trained)
    jax.tree.map(np.testing.assert_array_equal, scconv_jax.from_nnx(net.backbone)["batch_stats"], new["batch_stats"])


def test_the_mode_does_not_reach_modules_without_it():
    module = scconv_jax.to_nnx(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), X))
    module.eval()
    assert module(X).shape == (4, 16, 16, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MODEL, {"batch_stats": {}}), ValueError, "Variables are {'params': ..., 'batch_stats': ...}; got batch_stats."),
        ((MODEL, {"params": {"conv1": {}}}), ValueError, "of another network than ResNet: they have no bn1, layer1, layer2."),
        (("resnet50", {}), TypeError, "takes a Linen module; got str. Use create_model('resnet50')."),
        (((MODEL, {}), {}), TypeError, "takes a Linen module; got tuple. Unpack it: to_nnx(*load_model(NAME))."),
        ((nn.Dense(1), {"params": {}}, "0"), TypeError, "rngs='0' must be nnx.Rngs(dropout=0), a key or a seed."),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        scconv_jax.to_nnx(*arguments)


def test_from_nnx_takes_what_to_nnx_made():
    with pytest.raises(TypeError, match=r"from_nnx takes a module that to_nnx made; got Linear\."):
        scconv_jax.from_nnx(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
