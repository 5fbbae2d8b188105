import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scconv_jax
from tests.train.tiny import Tiny
from train.config import Augment, Data, Optim
from train.data.augment import make_augment, make_mix
from train.optim import make_optimizer
from train.parallel import make_parallel, run_once
from train.step import AXIS, eval_step, image_keys, joined_mean, train_step
from train.step import init_state as init_state_slowly

ENGINES = ("shard_map", "pmap")
OPTIM = Optim(lr=0.1, momentum=0.9, weight_decay=5e-4, label_smoothing=0.1)
AUGMENT = Data(crop_padding=2, flip=True)
NO_MIXING = Augment()


def to_float(images):
    return jnp.asarray(images).astype(jax.dtypes.canonicalize_dtype(float)) / 255 - 0.5


def init_state(*arguments, seed, **options):
    return run_once(functools.partial(init_state_slowly, *arguments, seed, **options))


def batches_of(steps, size, pixels=7, classes=10):
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (size, pixels, pixels, 3), dtype=np.uint8),
            "label": rng.integers(0, classes, size, dtype=np.int32),
        }
        for _ in range(steps)
    ]


def run(model, batches, devices, engine, *, optim=OPTIM, augment=AUGMENT, mixing=NO_MIXING, dtype=None, **options):
    """Takes a step per batch; returns the host's copies of the last state and of every step's metrics."""
    optimizer = make_optimizer(optim, optim.lr)
    state = init_state(model, optimizer, batches[0]["image"].shape[1:], seed=1, ema=optim.ema > 0)
    if dtype is not None:
        state = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    parallel = make_parallel(engine, jax.devices()[:devices])
    step = parallel.over_devices(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            augment=make_augment(augment),
            normalize=to_float,
            label_smoothing=optim.label_smoothing,
            seed=3,
            mix=make_mix(mixing),
            parts=optim.accumulate,
            unroll=True,
            ema_decay=optim.ema,
            **options,
        )
    )
    state, history = parallel.put_state(state), []
    for batch in batches:
        state, metrics = step(state, parallel.put_batch(batch))
        history.append(metrics)
    return jax.device_get((state, history))


def assert_equal(actual, expected, tolerance):
    """Every array equal to within `tolerance` of its largest value."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        limit = tolerance * max(1e-3, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("engine", ENGINES)
def test_eight_devices_equal_one(engine):
    model = Tiny(dtype=jnp.float64, axis_name=AXIS)
    batches = batches_of(steps=5, size=24)
    one = run(model, batches, 1, "shard_map", dtype=np.float64)
    eight = run(model, batches, 8, engine, dtype=np.float64)
    assert one[0].params["conv"]["kernel"].dtype == np.float64
    assert one[0].step == 5
    assert_equal(eight, one, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_a_share_are_as_good_as_devices(engine):
    """Two devices with four parts each take the step of eight: gradient, BatchNorm statistics, augmentation and mixing alike."""
    batches = batches_of(steps=3, size=32)
    mixing = Augment(mixup=0.4, cutmix=1.0)
    eight = run(Tiny(dtype=jnp.float64), batches, 8, "shard_map", mixing=mixing, dtype=np.float64)
    optim = dataclasses.replace(OPTIM, accumulate=4)
    two = run(Tiny(dtype=jnp.float64), batches, 2, engine, optim=optim, mixing=mixing, dtype=np.float64)
    assert_equal(two, eight, 1e-12)


@pytest.mark.usefixtures("x64")
def test_the_average_follows_parameters_and_statistics():
    """By a decay of (1 + step) / (10 + step), up to the given one."""
    model, decay = Tiny(dtype=jnp.float64), 0.2
    batches = batches_of(steps=4, size=16)
    optim = dataclasses.replace(OPTIM, ema=decay)
    start = jax.device_get(init_state(model, optax.identity(), (7, 7, 3), seed=1))
    expected = jax.tree.map(np.float64, {"params": start.params, "batch_stats": start.batch_stats})
    for step in range(4):
        state, _ = run(model, batches[: step + 1], 2, "shard_map", optim=optim, dtype=np.float64)
        new = {"params": state.params, "batch_stats": state.batch_stats}
        keep = min(decay, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda old, new, keep=keep: keep * old + (1 - keep) * new, expected, new)
        assert_equal(state.ema, expected, 1e-6)  # the decay is float32
    assert keep == decay
    plain, _ = run(model, batches, 2, "shard_map", dtype=np.float64)
    assert_equal(state.replace(ema=None), plain, 0)


def test_the_average_is_what_is_tested():
    model, parallel = Tiny(), make_parallel("shard_map", jax.devices())
    state = init_state(model, optax.identity(), (7, 7, 3), seed=0)
    other = init_state(model, optax.identity(), (7, 7, 3), seed=1)
    (batch,) = batches_of(1, 16)
    batch["weight"] = np.ones(16, np.float32)
    test = parallel.over_devices(functools.partial(eval_step, model=model, normalize=to_float))

    def loss(state):
        return float(test(parallel.put_state(state), parallel.put_batch(batch))["loss"])

    averaged = other.replace(ema={"params": state.params, "batch_stats": state.batch_stats})
    assert loss(averaged) == loss(state) != loss(other)


@pytest.mark.usefixtures("x64")
def test_rematerialisation_takes_the_same_step():
    model = Tiny(dtype=jnp.float64)
    batches = batches_of(steps=2, size=16)
    plain = run(model, batches, 2, "shard_map", dtype=np.float64)
    assert_equal(run(model, batches, 2, "shard_map", dtype=np.float64, rematerialise=True), plain, 1e-12)


def test_rematerialisation_keeps_little_for_the_gradient():
    """Bytes of what the forward pass hands to the backward pass."""
    model = scconv_jax.create_model("scnet20_small")
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)

    def kept(apply):
        def forward(params, images):
            return jax.vjp(lambda p: apply({**variables, "params": p}, images)[0], params)[1]

        stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables["batch_stats"])
        variables["batch_stats"] = stats
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(forward, variables["params"], images)))

    everything, little = (
        kept(functools.partial(model.clone(rematerialise=on).apply, train=True, mutable=["batch_stats"])) for on in (False, True)
    )
    assert little < 0.15 * everything


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_eight_devices_equal_one_with_a_network_of_the_library():
    model = scconv_jax.create_model("scnet20_small", dtype=jnp.float64, axis_name=AXIS).clone(stage_sizes=(1, 1, 1))
    batches = batches_of(steps=3, size=16, pixels=13)
    one = run(model, batches, 1, "shard_map", dtype=np.float64)
    eight = run(model, batches, 8, "shard_map", dtype=np.float64)
    assert_equal(eight, one, 1e-9)  # rounding, enlarged by 20 layers of BatchNorm over few pixels and by 3 steps


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_is_the_mean_over_the_batch(engine):
    """A gradient summed over the devices, not averaged, is eight times too large; Adam would even hide it."""
    model = Tiny(dtype=jnp.float64, axis_name=AXIS)
    (batch,) = batches_of(steps=1, size=16)
    plain = Optim(lr=1.0, momentum=0.0, weight_decay=0.0, label_smoothing=0.1)
    state, (metrics,) = run(model, [batch], 8, engine, optim=plain, augment=Data(), dtype=np.float64)

    first = init_state(model, optax.identity(), batch["image"].shape[1:], seed=1)
    variables = jax.tree.map(lambda x: x.astype(np.float64), {"params": first.params, "batch_stats": first.batch_stats})
    whole = model.clone(axis_name=None)

    def loss_of(params):
        logits, _ = whole.apply(variables | {"params": params}, to_float(batch["image"]), train=True, mutable=["batch_stats"])
        surprise = -jax.nn.log_softmax(logits)
        of_label = jnp.take_along_axis(surprise, batch["label"][:, None], axis=1)
        return 0.9 * of_label.mean() + 0.1 * surprise.mean(), logits

    (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    assert_equal(state.params, jax.tree.map(lambda p, g: p - g, variables["params"], grads), 1e-12)
    best = np.argsort(-logits, axis=1)
    top1, top5 = ((best[:, :k] == batch["label"][:, None]).any(1).mean() for k in (1, 5))
    assert 0 < top1 < top5 < 1
    assert_equal(metrics, {"loss": loss, "top1": top1, "top5": top5}, 1e-12)


@pytest.mark.usefixtures("x64")
def test_without_a_copy_per_device_the_gradient_would_be_the_sum(monkeypatch):
    """What `train_step` guards against is real: without its `pcast`, `shard_map` sums the gradient, silently."""
    model = Tiny(dtype=jnp.float64, axis_name=AXIS)
    batches = batches_of(steps=1, size=16)
    plain = Optim(lr=1.0, momentum=0.0, weight_decay=0.0)
    start = init_state(model, optax.identity(), batches[0]["image"].shape[1:], seed=1).params["fc"]["kernel"]

    def update():
        state, _ = run(model, batches, 8, "shard_map", optim=plain, dtype=np.float64)
        return state.params["fc"]["kernel"] - start

    right = update()
    monkeypatch.setattr(jax.lax, "pcast", lambda x, *_, **__: x)
    np.testing.assert_allclose(update(), 8 * right, rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_batchnorm_of_each_device_by_itself(engine):
    """Statistics of each device's share; what is kept, the same on all devices, is their average."""
    model = Tiny()
    (batch,) = batches_of(steps=1, size=16)
    start = init_state(model, optax.identity(), batch["image"].shape[1:], seed=1)
    variables = {"params": start.params, "batch_stats": start.batch_stats}

    def stats_of(images):
        return model.apply(variables, to_float(images), train=True, mutable=["batch_stats"])[1]["batch_stats"]

    shares = [stats_of(share) for share in np.split(batch["image"], 8)]
    expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *shares)
    state, _ = run(model, [batch], 8, engine, augment=Data())
    assert_equal(state.batch_stats, expected, 1e-6)
    whole = stats_of(batch["image"])["bn"]["var"]
    assert np.abs(state.batch_stats["bn"]["var"] - whole).max() > 1e-4, "the batch is too even to tell the two apart"


@pytest.mark.parametrize("engine", ENGINES)
def test_every_image_has_a_key_of_its_own_whatever_the_devices(engine):
    def keys(devices, seed, step):
        parallel = make_parallel(engine, jax.devices()[:devices])

        def draw(step, batch):
            numbers = jax.vmap(jax.random.uniform)(image_keys(seed, step, len(batch)))
            own = jax.lax.dynamic_update_slice(jnp.zeros(16), numbers, (jax.lax.axis_index(AXIS) * len(batch),))
            return jax.lax.psum(own, AXIS)

        return np.asarray(parallel.over_devices(draw)(jnp.asarray(step), parallel.put_batch(np.zeros(16))))

    one = keys(1, seed=0, step=5)
    assert len(set(one.tolist())) == 16
    np.testing.assert_array_equal(keys(8, seed=0, step=5), one)
    assert not np.isin(keys(1, seed=0, step=6), one).any()
    assert not np.isin(keys(1, seed=1, step=5), one).any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("most_axes", [0, 1, 4])
def test_joined_arrays_have_the_same_mean_bit_for_bit(engine, most_axes):
    parallel = make_parallel(engine, jax.devices())
    rng = np.random.default_rng(0)
    own = {"kernel": rng.normal(size=(8, 3, 4)), "bias": rng.normal(size=(8, 5)), "loss": rng.normal(size=8)}

    def both(_, own):
        own = {name: x[0] for name, x in own.items()}
        return joined_mean(own, most_axes), jax.lax.pmean(own, AXIS)

    joined, separate = parallel.over_devices(both)(jnp.zeros(()), parallel.put_batch(own))
    jax.tree.map(np.testing.assert_array_equal, joined, separate)
    for name, x in own.items():
        assert joined[name].shape == x.shape[1:]
        np.testing.assert_allclose(joined[name], x.mean(0), rtol=1e-5)


def test_the_old_state_is_given_up():
    model = Tiny()
    optimizer = make_optimizer(OPTIM, OPTIM.lr)
    for engine in ENGINES:
        parallel = make_parallel(engine, jax.devices())
        step = functools.partial(
            train_step, model=model, optimizer=optimizer, augment=lambda _, x: x, normalize=to_float, label_smoothing=0.0, seed=0
        )
        before = parallel.put_state(init_state(model, optimizer, (7, 7, 3), seed=0))
        parallel.over_devices(step, donate_state=True)(before, parallel.put_batch(batches_of(1, 8)[0]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_counts_what_has_weight(engine):
    """Of 16 images, 13 are recognised; the last 5, recognised too, have no weight."""
    model = Tiny()
    (batch,) = batches_of(1, 16)
    state = init_state(model, optax.identity(), (7, 7, 3), seed=0)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.asarray(model.apply(variables, to_float(batch["image"]), train=False), np.float64)
    labels = logits.argmax(1).astype(np.int32)
    labels[:3] = (labels[:3] + 1) % 10
    weight = (np.arange(16) < 11).astype(np.float32)

    parallel = make_parallel(engine, jax.devices())
    step = parallel.over_devices(functools.partial(eval_step, model=model, normalize=to_float))
    whole = {"image": batch["image"], "label": labels, "weight": weight}
    sums = jax.device_get(step(parallel.put_state(state), parallel.put_batch(whole)))

    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), labels]
    assert sums["count"] == 11
    assert sums["top1"] == 8
    np.testing.assert_allclose(sums["loss"], losses[:11].sum(), rtol=1e-5)
