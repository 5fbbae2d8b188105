import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import Config, Data, Optim, make_plan
from train.optim import make_optimizer, make_schedule


def rates(steps_per_epoch=10, **fields):
    config = Config(epochs=10, data=Data(batch_size=4), optim=Optim(lr=0.8, **fields))
    schedule = make_schedule(config.optim, make_plan(config, 4 * steps_per_epoch, devices=1))
    return np.asarray([schedule(step) for step in range(10 * steps_per_epoch + 1)])


def test_warmup_then_cosine_to_zero():
    lr = rates(schedule="cosine", warmup_epochs=2)
    np.testing.assert_allclose(lr[:21], np.linspace(0, 0.8, 21), atol=1e-6)
    np.testing.assert_allclose(lr[20:], 0.4 * (1 + np.cos(np.pi * np.arange(81) / 80)), atol=1e-6)


def test_steps_fall_at_their_epochs_with_or_without_warmup():
    expected = np.repeat([0.8, 0.08, 0.008], [50, 25, 26])
    np.testing.assert_allclose(rates(schedule="step", drop_epochs=(5, 7.5)), expected, rtol=1e-5)
    warm = rates(schedule="step", drop_epochs=(5, 7.5), warmup_epochs=1)
    np.testing.assert_allclose(warm[10:], expected[10:], rtol=1e-5)


def test_sgd_is_that_of_pytorch():
    """PyTorch: g ← g + wd·p, v ← momentum·v + g, p ← p - lr·v. On every parameter, biases too."""
    rng = np.random.default_rng(0)
    lr, momentum, decay = 0.3, 0.9, 0.05
    optimizer = make_optimizer(Optim(lr=lr, momentum=momentum, weight_decay=decay), lr)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "bias": jnp.asarray([0.5, -0.5])}
    ours, state = params, optimizer.init(params)
    theirs = {name: np.asarray(p, np.float64) for name, p in params.items()}
    velocity = {name: np.zeros_like(p) for name, p in theirs.items()}
    for _ in range(5):
        grads = {name: rng.normal(size=p.shape) for name, p in theirs.items()}
        updates, state = optimizer.update({n: jnp.asarray(g, jnp.float32) for n, g in grads.items()}, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, grad in grads.items():
            velocity[name] = momentum * velocity[name] + grad + decay * theirs[name]
            theirs[name] = theirs[name] - lr * velocity[name]
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6)


def test_the_rate_grows_with_the_batch_where_it_is_meant_for_another():
    for batch, expected in ((1024, 3.2), (64, 0.2)):
        config = Config(data=Data(batch_size=batch), optim=Optim(lr=0.8, lr_reference_batch=256))
        plan = make_plan(config, 4096, devices=1)
        assert plan.peak_lr == pytest.approx(expected)
        assert make_schedule(config.optim, plan)(0) == pytest.approx(expected)


PARAMS = {"kernel": jnp.asarray([[3.0, 4.0]]), "bias": jnp.asarray([2.0])}
GRADS = {"kernel": jnp.asarray([[0.6, 0.8]]), "bias": jnp.asarray([1.0])}


def updates_of(**fields):
    optimizer = make_optimizer(Optim(momentum=0.0, **fields), 1.0)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return (-np.concatenate([updates["kernel"].ravel(), updates["bias"]])).tolist()


def test_decay_may_spare_biases_and_norms():
    assert updates_of(weight_decay=0.1) == pytest.approx([0.9, 1.2, 1.2])
    assert updates_of(weight_decay=0.1, decay_kernels_only=True) == pytest.approx([0.9, 1.2, 1.0])


def test_a_long_gradient_is_shortened_before_decay():
    """The length is that of all parameters' gradients together: √(0.6² + 0.8² + 1²) = √2."""
    scale = 0.5 / 2**0.5
    found = updates_of(weight_decay=0.1, clip_norm=0.5)
    assert found == pytest.approx([0.6 * scale + 0.3, 0.8 * scale + 0.4, scale + 0.2])
    assert updates_of(weight_decay=0.0, clip_norm=2.0) == updates_of(weight_decay=0.0)


def test_lars_adapts_kernels_alone():
    """Kernel: 0.001 · ‖p‖ / ‖g + wd·p‖ times (g + wd·p), which points along p here; bias: g."""
    found = updates_of(name="lars", weight_decay=0.1)
    assert found == pytest.approx([0.003, 0.004, 1.0], rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_without_warmup_the_first_step_has_the_full_rate(schedule):
    assert rates(schedule=schedule)[0] == pytest.approx(0.8)
