"""Five steps of SGD as PyTorch takes them: the last link of the proof, in which every earlier error would add up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from scconv_jax import create_model, to_torch
from tests.equivalence import compare_statistics, jit, variables_of
from tests.reference.networks import build
from tests.reference.state import nchw, random_images, randomise

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, SMOOTHING, CLASSES, STEPS = 0.05, 0.9, 1e-2, 0.1, 10, 5


def batches():
    for step in range(STEPS):
        labels = np.random.default_rng(step).integers(0, CLASSES, 6)
        yield random_images((6, 15, 18, 3), step), labels


def train_with_pytorch(oracle):
    optimiser = torch.optim.SGD(oracle.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    oracle.train()
    for images, labels in batches():
        loss = criterion(oracle(nchw(images)), torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def train_with_jax(model, variables):
    optimiser = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))

    @jit
    def step(variables, state, images, labels):
        def loss_of(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype), SMOOTHING)
            return optax.softmax_cross_entropy(logits, targets).mean(), new

        (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, state = optimiser.update(gradients, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state, loss

    state = optimiser.init(variables["params"])
    for images, labels in batches():
        variables, state, loss = step(variables, state, jnp.asarray(images), jnp.asarray(labels))
        yield loss, variables


@pytest.mark.parametrize("name", ["scnet20_small", "resnet20_small"])
@pytest.mark.usefixtures("x64")
def test_five_steps_of_sgd(close, name):
    oracle = randomise(build(name), 0).double()
    model = create_model(name, dtype=jnp.float64)
    variables = variables_of(oracle, model, random_images((6, 15, 18, 3), 0))
    start = jax.tree.map(np.asarray, variables)
    losses, states = zip(*train_with_jax(model, variables), strict=True)
    close(np.array(losses), np.array(list(train_with_pytorch(oracle))), "losses", limit=1e-10)
    assert np.unique(losses).size == STEPS
    end = states[-1]

    def close_within(ours, theirs, what):
        close(ours, theirs, what, limit=1e-10)

    found = to_torch(end)
    before = to_torch(start)
    for parameter, value in oracle.named_parameters():
        close_within(found[parameter], value.detach().numpy(), parameter)
        assert np.abs(found[parameter] - before[parameter]).max() > 1e-4, f"{parameter} has not moved"
    compare_statistics(close_within, end["params"], end["batch_stats"], oracle)
