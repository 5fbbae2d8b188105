"""A network's inference and training step as JAX programs: random images, cross-entropy, SGD with momentum."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import scconv_jax


class Program(NamedTuple):
    """A jitted function and its first arguments."""

    function: Any
    arguments: tuple[Any, ...]


def batch(images: int, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Return images `(n, size, size, 3)` and labels `(n,)`."""
    x = np.random.default_rng(0).normal(size=(images, size, size, 3)).astype(np.float32)
    return x, np.arange(images) % 1000


def variables_of(model: Any, size: int = 224) -> Any:
    """Return initial variables, compiled without optimisation: the draws would take ten seconds to compile."""
    images = jnp.zeros((1, size, size, 3))
    return jax.jit(
        lambda: model.init(jax.random.key(0), images, train=False), compiler_options={"xla_backend_optimization_level": 0}
    )()


def inference(name: str, images: int, size: int = 224, *, fused: bool = False) -> Program:
    """Return the inference of a network, after `scconv_jax.fuse` if `fused`: (variables, images) → logits."""
    model = scconv_jax.create_model(name)
    variables, x = variables_of(model, size), jnp.asarray(batch(images, size)[0])
    if fused:
        fuse: Any = scconv_jax.fuse
        model, variables = fuse(model, variables, x)
    return Program(jax.jit(lambda variables, x: model.apply(variables, x, train=False)), (variables, x))


def layer(module: Any, x: jax.Array, *, step: bool) -> Program:
    """Return a layer's forward pass or, if `step`, its gradients too: (variables, x) → results. Σ y² is differentiated."""
    train = {"train": step} if "train" in inspect.signature(module.__call__).parameters else {}
    variables = module.init(jax.random.key(0), x, **train)

    def forward(variables: Any, x: jax.Array) -> jax.Array:
        return module.apply(variables, x, **train, mutable=["batch_stats"])[0]

    def both_ways(variables: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.square(forward(variables | {"params": params}, x)).sum()

        return jax.grad(loss, (0, 1))(variables["params"], x)

    return Program(jax.jit(both_ways if step else forward), (variables, x))


def training_step(name: str, images: int, size: int = 224) -> Program:
    """Return a training step of a network: (params, batch_stats, state, images, labels) → the first three. They are donated."""
    model = scconv_jax.create_model(name)
    x, labels = (jnp.asarray(array) for array in batch(images, size))
    optimiser = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9))

    def loss(params: Any, batch_stats: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        logits, new = model.apply({"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

    def step(params: Any, batch_stats: Any, state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, Any, Any]:
        (_, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, x, labels)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), batch_stats, state

    variables = variables_of(model, size)
    state = (variables["params"], variables["batch_stats"], optimiser.init(variables["params"]))
    return Program(jax.jit(step, donate_argnums=(0, 1, 2)), (*state, x, labels))
