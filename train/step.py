"""One step of training and one of evaluation, as each device sees it: pure functions of state and batch.

`train.parallel` maps them over the devices. Every device holds the same state and its own share of the batch; what
they return is the same on all of them. There is no I/O and no clock here, and the only randomness is that of
`image_keys`, to which the number of devices makes no difference.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

AXIS = "data"
"""The mapped axis, over which the batch is split."""


class TrainState(flax.struct.PyTreeNode):
    """All that training changes."""

    step: Array
    """Steps taken: int32 ()."""
    params: Any
    batch_stats: Any
    opt_state: Any


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, int, int], seed: int
) -> TrainState:
    """The state before the first step; `image_shape` is (h, w, 3)."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augment: Callable[[Array, Array], Array],
    normalize: Callable[[Array], Array],
    label_smoothing: float,
    seed: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of gradient descent on this device's share of the batch.

    Args:
        state: the same on all devices.
        batch: `image` uint8 (n, h, w, 3), `label` int32 (n,), n images per device.
        model: a network of the library.
        optimizer: an optax transformation.
        augment: (keys (n,), images) → images.
        normalize: images → float images, what the network takes.
        label_smoothing: share of the target spread evenly over all classes.
        seed: of the run.

    Returns:
        The next state, and `loss` and `top1` of the whole batch (before the step).
    """
    images = normalize(augment(image_keys(seed, state.step, len(batch["label"])), batch["image"]))

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, new = model.apply(
            {"params": params, "batch_stats": state.batch_stats}, images, train=True, mutable=["batch_stats"]
        )
        targets = optax.losses.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), label_smoothing)
        return optax.losses.softmax_cross_entropy(logits, targets).mean(), (logits, new["batch_stats"])

    # Each device differentiates a copy of the parameters of its own. Were they shared, `shard_map` would already sum
    # the gradient over the devices, and the mean below would leave it as many times too large as there are devices.
    own_params = jax.lax.pcast(state.params, AXIS, to="varying")
    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(own_params)
    top1 = (logits.argmax(-1) == batch["label"]).mean()
    grads, batch_stats, metrics = jax.lax.pmean((grads, batch_stats, {"loss": loss, "top1": top1}), AXIS)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    ), metrics


def image_keys(seed: int, step: Array, share: int) -> Array:
    """Keys (share,) for the images of this device's share: of seed, step and an image's position in the whole batch."""
    positions = jax.lax.axis_index(AXIS) * share + jnp.arange(share)
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions)


def eval_step(
    state: TrainState, batch: dict[str, Array], *, model: nn.Module, normalize: Callable[[Array], Array]
) -> dict[str, Array]:
    """Sums over the whole batch of `loss`, `correct` and `count`; images of `weight` 0 do not count."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, normalize(batch["image"]), train=False)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(-1) == batch["label"]
    weight = batch["weight"]
    sums = {"loss": (losses * weight).sum(), "correct": (correct * weight).sum(), "count": weight.sum()}
    return jax.lax.psum(sums, AXIS)
