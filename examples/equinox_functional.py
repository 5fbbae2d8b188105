"""Both operators in Equinox, on the pure functions of `scconv_jax.functional`.

The functions take arrays, so a module of any JAX library can hold their kernels. `self_calibrated_conv` receives its
four convolutions as functions: here each is a convolution followed by a norm of the module's own choice.
`spatial_reconstruction` (SRU) and `channel_reconstruction` (CRU) take their kernels.

Equinox maps single examples with `jax.vmap`; the operators take batches `(n, h, w, c)`, so these modules do too.

Command    python examples/equinox_functional.py [--small]        needs: pip install equinox
Time       --small: 17 s on two cores of an AMD EPYC. Full form: not measured
Result     --small, seed 0, on digits that were not trained on: 9.7 % right before training, 95.6 % after
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from scconv_jax import functional as F


def kernel(key, size, inputs, outputs):
    """Returns a kernel `(size, size, inputs, outputs)` with He's initial values."""
    return jax.random.normal(key, (size, size, inputs, outputs)) * (2 / (size * size * inputs)) ** 0.5


def normalised(x):
    """Returns maps whose channels have mean 0 and variance 1 within each image."""
    return (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(x.var((1, 2), keepdims=True) + 1e-5)


class SelfCalibrated(eqx.Module):
    """Self-calibrated convolution (2020): `(n, h, w, c)` to the same shape."""

    kernels: list[jax.Array]

    def __init__(self, channels, key):
        self.kernels = [kernel(key, 3, channels // 2, channels // 2) for key in jax.random.split(key, 4)]

    def __call__(self, x):
        def conv(weight):
            return lambda x: normalised(F.conv(x, weight, padding=1))

        return F.self_calibrated_conv(x, *map(conv, self.kernels))


class Reconstruction(eqx.Module):
    """ScConv (2023), SRU then CRU, with α = 1/2, r = 2 and g = 2: `(n, h, w, c)` to the same shape."""

    gamma: jax.Array
    beta: jax.Array
    squeeze1: jax.Array
    squeeze2: jax.Array
    gwc: jax.Array
    gwc_bias: jax.Array
    pwc1: jax.Array
    pwc2: jax.Array

    def __init__(self, channels, key):
        half, quarter = channels // 2, channels // 4
        keys = jax.random.split(key, 5)
        self.gamma, self.beta = jnp.ones(channels), jnp.zeros(channels)
        self.squeeze1, self.squeeze2 = kernel(keys[0], 1, half, quarter), kernel(keys[1], 1, half, quarter)
        self.gwc, self.gwc_bias = kernel(keys[2], 3, quarter // 2, channels), jnp.zeros(channels)
        self.pwc1, self.pwc2 = kernel(keys[3], 1, quarter, channels), kernel(keys[4], 1, quarter, channels - quarter)

    def __call__(self, x):
        x = F.spatial_reconstruction(x, self.gamma, self.beta, groups=4)
        return F.channel_reconstruction(x, self.squeeze1, self.squeeze2, self.gwc, self.gwc_bias, self.pwc1, self.pwc2)


class Classifier(eqx.Module):
    """Images `(n, h, w, 1)` to logits `(n, 10)`."""

    stem: jax.Array
    calibrated: SelfCalibrated
    reconstruction: Reconstruction
    head: jax.Array

    def __init__(self, width, key):
        keys = jax.random.split(key, 4)
        self.stem = kernel(keys[0], 3, 1, width)
        self.calibrated, self.reconstruction = SelfCalibrated(width, keys[1]), Reconstruction(width, keys[2])
        self.head = jnp.zeros((width, 10))

    def __call__(self, x):
        x = jax.nn.relu(F.conv(x, self.stem, padding=1))
        x = F.max_pool(jax.nn.relu(self.calibrated(x)), 2, 2)
        x = jax.nn.relu(self.reconstruction(x))
        return F.global_avg_pool(x) @ self.head


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a narrow network and few steps")
    options = parser.parse_args(arguments)
    width, steps, n = (32, 100, 64) if options.small else (64, 1500, 64)

    digits = load_digits()
    images, labels = digits.images.astype(np.float32)[..., None] / 16, digits.target
    train, test = slice(1437), slice(1437, None)
    optimiser = optax.adam(1e-2)

    @eqx.filter_jit
    def step(model, momentum, images, labels):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, momentum = optimiser.update(gradient, momentum)
        return eqx.apply_updates(model, updates), momentum, value

    @eqx.filter_jit
    def accuracy(model, images, labels):
        return (model(images).argmax(1) == labels).mean()

    model = Classifier(width, jax.random.key(0))
    momentum = optimiser.init(model)
    before = float(accuracy(model, images[test], labels[test]))
    generator = np.random.default_rng(0)
    for i in range(steps):
        chosen = generator.choice(1437, n, replace=False)
        model, momentum, loss = step(model, momentum, images[train][chosen], labels[train][chosen])
        if i % 20 == 0:
            print(f"step {i:4}   loss {float(loss):.3f}")
    after = float(accuracy(model, images[test], labels[test]))
    print(f"unseen digits: {before:.1%} right before training, {after:.1%} after")
    return {"accuracy": (before, after)}


if __name__ == "__main__":
    main()
