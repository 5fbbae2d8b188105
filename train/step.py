"""One step of training and one of evaluation, as each device sees it: pure functions of state and batch.

`train.parallel` maps them over the devices. Every device holds the same state and its own share of the batch; what
they return is the same on all of them. There is no I/O and no clock here, and the only randomness is that of
`image_keys` and `batch_key`, to which the number of devices makes no difference.
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
from jax.ad_checkpoint import checkpoint_name

AXIS = "data"
"""The mapped axis, over which the batch is split."""


class TrainState(flax.struct.PyTreeNode):
    """All that training changes."""

    step: Array
    """Steps taken: int32 ()."""
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None
    """Moving average of the two, `{"params", "batch_stats"}`; None where none is kept."""


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool = False,
) -> TrainState:
    """The state before the first step; `image_shape` is (h, w, 3). With `ema`, it has a moving average."""
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
    rematerialise: bool = False,
    ema_decay: float = 0.0,
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
        mix: (key, h, w) → share (h, w) of its own that each pixel keeps when neighbours, in pairs, are blended; n must be even.
        parts: number of pieces, n / parts images each, of which one after the other is in memory. Their gradients and
            BatchNorm statistics are averaged, as if each were a device's share.
        rematerialise: compute the blocks of the network again for the gradient, instead of keeping what they compute.
        ema_decay: highest decay of the moving average, where the state has one.

    Returns:
        The next state, and `loss`, `top1` and, of more than five classes, `top5` of the whole batch (before the step).
        Where images are mixed, the right class is that of the larger share.
    """
    apply = rematerialised(model) if rematerialise else partial(model.apply, train=True, mutable=["batch_stats"])

    def loss_of(params: Any, images: Array, labels: Array, keys: Array) -> tuple[Array, tuple[dict[str, Array], Any]]:
        images = normalize(augment(keys, images))
        kept = mix and mix(batch_key(seed, state.step), *images.shape[1:3])
        if kept is not None:
            images = blend_pairs(images, kept[None, :, :, None])
        logits, new = apply({"params": params, "batch_stats": state.batch_stats}, images)
        targets = optax.losses.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        if kept is not None:
            targets = blend_pairs(targets, kept.mean(keepdims=True))
        loss = optax.losses.softmax_cross_entropy(logits, targets).mean()
        hits = {name: hit.mean(dtype=loss.dtype) for name, hit in recognised(logits, targets.argmax(-1)).items()}
        return loss, ({"loss": loss, **hits}, new["batch_stats"])

    # Each device differentiates a copy of the parameters of its own. Were they shared, `shard_map` would already sum
    # the gradient over the devices, and the mean below would leave it as many times too large as there are devices.
    own_params = jax.lax.pcast(state.params, AXIS, to="varying")

    def gradient_of(*share: Array) -> tuple[Any, Any, dict[str, Array]]:
        (_, (metrics, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(own_params, *share)
        return grads, batch_stats, metrics

    share = (batch["image"], batch["label"], image_keys(seed, state.step, len(batch["label"])))
    results = gradient_of(*share) if parts == 1 else _mean_over_parts(gradient_of, share, parts)
    grads, batch_stats, metrics = jax.lax.pmean(results, AXIS)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # Early on the average is short, so that the initial values are soon forgotten.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update({"params": params, "batch_stats": batch_stats}, ema, 1 - decay)
    return TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema), metrics


def _mean_over_parts(function: Callable[..., Any], share: tuple[Array, ...], parts: int) -> Any:
    """Mean of `function` over the parts of a device's share, one after the other."""
    pieces = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), share)

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*piece)), None

    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jax.lax.pcast(jnp.zeros(x.shape, x.dtype), AXIS, to="varying"), shapes)
    # On a CPU, XLA's convolutions are five times slower in a loop.
    total, _ = jax.lax.scan(add, zeros, pieces, unroll=jax.default_backend() == "cpu")
    return jax.tree.map(lambda x: x / parts, total)


def rematerialised(model: nn.Module) -> Callable[..., Any]:
    """`model.apply` in training, of which only the outputs of blocks (`layer1/0`) are kept for the gradient."""

    def tag(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = next_call(*args, **kwargs)
        if context.method_name == "__call__" and len(context.module.path) == 2:
            result = jax.tree.map(lambda x: checkpoint_name(x, "block"), result)
        return result

    def apply(variables: Any, images: Array) -> Any:
        with nn.intercept_methods(tag):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

    return jax.checkpoint(apply, policy=jax.checkpoint_policies.save_only_these_names("block"))


def blend_pairs(x: Array, kept: Array) -> Array:
    """Each of `x` (n, ...) with its neighbour (0 with 1, 2 with 3, …): `kept` of its own, the rest of the other's."""
    partner = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
    kept = kept.astype(x.dtype)
    return x * kept + partner * (1 - kept)


def image_keys(seed: int, step: Array, share: int) -> Array:
    """Keys (share,) for the images of this device's share: of seed, step and an image's position in the whole batch."""
    positions = jax.lax.axis_index(AXIS) * share + jnp.arange(share)
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions)


def batch_key(seed: int, step: Array) -> Array:
    """The key for what is drawn once for the whole batch: of seed and step, and no image's."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 2**32 - 1)


def recognised(logits: Array, labels: Array) -> dict[str, Array]:
    """Whether each label (n,) is the class of the largest logit (`top1`) and, of more than five classes, of the five largest."""
    hits = {"top1": logits.argmax(-1) == labels}
    if logits.shape[-1] > 5:
        hits["top5"] = (jax.lax.top_k(logits, 5)[1] == labels[:, None]).any(-1)
    return hits


def eval_step(
    state: TrainState, batch: dict[str, Array], *, model: nn.Module, normalize: Callable[[Array], Array]
) -> dict[str, Array]:
    """Sums over the whole batch of `loss`, `top1`, `top5` (as of `recognised`) and `count`; images of `weight` 0 do not count.

    Where the state has a moving average, that is what is tested.
    """
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, normalize(batch["image"]), train=False)
    values = {
        "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
        **recognised(logits, batch["label"]),
        "count": 1.0,
    }
    return jax.lax.psum({name: (value * batch["weight"]).sum() for name, value in values.items()}, AXIS)
