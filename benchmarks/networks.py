"""Networks against PyTorch: inference and a training step, batch 8 at 224 px, float32.

PyTorch runs eagerly, in channels-last memory format, with one thread per core. Both sides run the same network and the same
step: cross-entropy, SGD with momentum 0.9 and weight decay 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import scconv_jax
from benchmarks.timing import alternate, milliseconds, ratio, record, table
from tests.reference import networks as oracles

NETWORKS = ("scnet50", "resnet50")  # against PyTorch
TWIN = ("scconv_resnet50", "resnet50")  # against each other
BATCH, SIZE = 8, 224
ROUNDS = {"inference": 31, "training step": 11}


def main() -> None:
    """Measure and record."""
    rows = []
    for name in NETWORKS:
        ours, theirs = jax_functions(name), torch_functions(name)
        for work in ("inference", "training step"):
            seconds = alternate({"jax": ours[work], "torch": theirs[work]}, ROUNDS[work])
            rows.append(
                [
                    name,
                    work,
                    milliseconds(seconds["jax"]),
                    milliseconds(seconds["torch"]),
                    ratio(seconds["jax"], seconds["torch"]),
                ]
            )
    ours = {name: jax_functions(name, step=False)["inference"] for name in TWIN}
    seconds = alternate(ours, ROUNDS["inference"])
    first, second = (seconds[name] for name in TWIN)
    twin = f"{TWIN[0]} {milliseconds(first)} ms, {TWIN[1]} {milliseconds(second)} ms, ratio {ratio(first, second)}."
    header = ["network", "work", "JAX, ms", "PyTorch, ms", "JAX / PyTorch (min to max)"]
    rounds = " or ".join(f"{count} {work} rounds" for work, count in ROUNDS.items()).replace("training step", "training-step")
    text = (
        f"Batch {BATCH} at {SIZE} px, float32; median of {rounds}, JAX and PyTorch alternating; PyTorch eager, channels_last.\n\n"
    )
    record("networks", "Networks against PyTorch", f"{text}{table(header, rows)}\n\nInference in JAX: {twin}")


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return images `(n, h, w, 3)` and labels `(n,)`."""
    images = np.random.default_rng(0).normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return images, np.arange(BATCH)


def jax_functions(name: str, *, step: bool = True) -> dict[str, Callable[[], object]]:
    """Return compiled inference and, if `step`, the training step."""
    images, labels = (jnp.asarray(x) for x in batch())
    model = scconv_jax.create_model(name)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    optimiser = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9))

    def loss(params: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        logits, new = model.apply({"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

    def train_step(params: Any, batch_stats: Any, state: optax.OptState) -> tuple[Any, Any, optax.OptState]:
        (_, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch_stats)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), batch_stats, state

    infer = jax.jit(
        lambda variables, images: model.apply(variables, images, train=False), compiler_options=scconv_jax.inference_options()
    )
    compiled_step = jax.jit(train_step, donate_argnums=(0, 1, 2))
    trained = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
    state = (*trained, optimiser.init(trained[0]))

    def run_step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled_step(*state))

    functions: dict[str, Callable[[], object]] = {"inference": lambda: jax.block_until_ready(infer(variables, images))}
    return functions | ({"training step": run_step} if step else {})


def torch_functions(name: str) -> dict[str, Callable[[], object]]:
    """Return PyTorch's inference and training step."""
    images, labels = batch()
    model: Any = oracles.build(name)
    model = model.to(memory_format=torch.channels_last)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view: the memory stays channels last
    y = torch.from_numpy(labels)
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(x)

    def step() -> None:
        model.train()
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()

    return {"inference": infer, "training step": step}


if __name__ == "__main__":
    main()
