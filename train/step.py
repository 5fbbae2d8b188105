"""The training step and the evaluation step of one device: pure functions of state and batch.

`train.parallel` maps them over the devices. Every device has the same state and its own share of the batch, and all devices
return the same values. This file does no I/O and reads no clock. All randomness comes from `image_keys` and `batch_key`, which do
not depend on the number of devices, and `share_key`, which depends on how the batch is shared.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

AXIS = "data"
"""Name of the mapped axis, along which the batch is split."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes."""

    step: Array
    """Number of steps taken: int32 ()."""
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None
    """Moving average, `{"params", "batch_stats"}`, or None."""


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool = False,
) -> TrainState:
    """Return the state before the first step, with a moving average if `ema`. `image_shape` is (h, w, 3)."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        ema={name: variables[name] for name in ("params", "batch_stats")} if ema else None,
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
    mix: Callable[[Array, int, int], Array] | None = None,
    parts: int = 1,
    unroll: bool = False,
    rematerialise: bool = False,
    ema_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one step of gradient descent on this device's share of the batch.

    Args:
        state: The same on all devices.
        batch: `image` uint8 (n, h, w, 3) and `label` int32 (n,), for n images per device.
        model: A network of the library.
        optimizer: An optax transformation.
        augment: (keys (n,), images) → images.
        normalize: uint8 images → float images, the network's input.
        label_smoothing: Share of the target that is spread evenly over all classes.
        seed: Seed of the run.
        mix: (key, h, w) → weights (h, w), the share that each pixel keeps of its own image when neighbouring images are
            blended in pairs; n must be even.
        parts: Number of parts, n / parts images each, computed one after the other to save memory. Their gradients
            and BatchNorm statistics are averaged, as over devices.
        unroll: Write the parts out instead of looping over them, which is faster on CPU.
        rematerialise: Recompute the blocks of the network in the backward pass instead of storing their activations.
        ema_decay: Upper limit of the moving average's decay, if the state has a moving average.

    Returns:
        The next state, and the metrics of the whole batch before the step: `loss`, `top1` and, with more than five classes,
        `top5`. If images are mixed, the label with the larger share counts as correct.
    """
    model = model.clone(rematerialise=True) if rematerialise else model

    def loss_of(params: Any, images: Array, labels: Array, keys: Array) -> tuple[Array, tuple[dict[str, Array], Any]]:
        images = normalize(augment(keys, images))
        kept = mix and mix(batch_key(seed, state.step), *images.shape[1:3])
        if kept is not None:
            images = blend_pairs(images, kept[None, :, :, None])
        variables, rngs = {"params": params, "batch_stats": state.batch_stats}, {"dropout": share_key(keys)}
        logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        targets = optax.losses.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        if kept is not None:
            targets = blend_pairs(targets, kept.mean(keepdims=True))
        loss = optax.losses.softmax_cross_entropy(logits, targets).mean()
        hits = {name: hit.mean(dtype=loss.dtype) for name, hit in top_k_hits(logits, targets.argmax(-1)).items()}
        return loss, ({"loss": loss, **hits}, new["batch_stats"])

    # Each device differentiates its own copy of the parameters. If they were shared, `shard_map` would already sum the gradient
    # over the N devices, and the mean below would leave it N times too large.
    own_params = jax.lax.pcast(state.params, AXIS, to="varying")

    def gradient_of(*share: Array) -> tuple[Any, Any, dict[str, Array]]:
        (_, (metrics, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(own_params, *share)
        return grads, batch_stats, metrics

    share = (batch["image"], batch["label"], image_keys(seed, state.step, len(batch["label"])))
    results = gradient_of(*share) if parts == 1 else _mean_over_parts(gradient_of, share, parts, unroll)
    grads, batch_stats, metrics = mean_over_devices(results)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # The decay is smaller at first, so that the average soon forgets the initial values.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update({"params": params, "batch_stats": batch_stats}, ema, 1 - decay)
    return TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema), metrics


def mean_over_devices(tree: Any) -> Any:
    """Return the mean of each array over the devices, in one all-reduce.

    XLA puts at most 256 arrays into one all-reduce on TPUs, and far fewer on GPUs. So arrays are joined first: all of them or, on
    TPUs, the vectors only. Kernels have layouts of their own there, and to join them would copy them.
    """
    if jax.lax.axis_size(AXIS) == 1:
        return jax.lax.pmean(tree, AXIS)
    return jax.lax.platform_dependent(tree, tpu=partial(joined_mean, most_axes=1), default=partial(joined_mean, most_axes=4))


def joined_mean(tree: Any, most_axes: int) -> Any:
    """Return the mean of each array over the devices. Those with at most `most_axes` axes are reduced as one."""
    leaves, structure = jax.tree.flatten(tree)
    joined, split = ravel_pytree([x if x.ndim <= most_axes else None for x in leaves])
    means, others = jax.lax.pmean((joined, [x if x.ndim > most_axes else None for x in leaves]), AXIS)
    return structure.unflatten(y if x is None else x for x, y in zip(others, split(means), strict=True))


def _mean_over_parts(function: Callable[..., Any], share: tuple[Array, ...], parts: int, unroll: bool) -> Any:
    """Return the mean of `function` over the parts of a device's share, computed one after the other."""
    pieces = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), share)

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*piece)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jax.lax.pcast(jnp.zeros(x.shape, x.dtype), AXIS, to="varying"), shapes)
    total, _ = jax.lax.scan(add, zeros, pieces, unroll=unroll)
    return jax.tree.map(lambda x: x / parts, total)


def blend_pairs(x: Array, kept: Array) -> Array:
    """Blend each of `x` (n, ...) with its neighbour (0 with 1, 2 with 3, …), with weights `kept` and `1 - kept`."""
    partner = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
    kept = kept.astype(x.dtype)
    return x * kept + partner * (1 - kept)


def image_keys(seed: int, step: Array, share: int) -> Array:
    """Return keys (share,) for this device's images. They depend on seed, step and position in the global batch."""
    positions = jax.lax.axis_index(AXIS) * share + jnp.arange(share)
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions)


def batch_key(seed: int, step: Array) -> Array:
    """Return the key for random values of a whole batch. It depends on seed and step and differs from all image keys."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 2**32 - 1)


def share_key(keys: Array) -> Array:
    """Return the key of the network's own random values, for the images with these `keys`: another on each device and part."""
    return jax.random.fold_in(keys[0], 2**32 - 1)


def top_k_hits(logits: Array, labels: Array) -> dict[str, Array]:
    """Return `top1` and, with more than five classes, `top5`: whether each label (n,) is among the largest logits, bool (n,)."""
    hits = {"top1": logits.argmax(-1) == labels}
    if logits.shape[-1] > 5:
        hits["top5"] = (jax.lax.top_k(logits, 5)[1] == labels[:, None]).any(-1)
    return hits


def eval_step(
    state: TrainState, batch: dict[str, Array], *, model: nn.Module, normalize: Callable[[Array], Array]
) -> dict[str, Array]:
    """Return sums over the global batch of `loss`, the hits of `top_k_hits` and `count`. Images of `weight` 0 do not count.

    The moving average is evaluated if the state has one.
    """
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, normalize(batch["image"]), train=False)
    values = {
        "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
        **top_k_hits(logits, batch["label"]),
        "count": 1.0,
    }
    return jax.lax.psum({name: (value * batch["weight"]).sum() for name, value in values.items()}, AXIS)
