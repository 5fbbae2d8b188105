import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.tiny import Tiny
from train.checkpoint import Checkpoints
from train.config import ConfigError, Optim
from train.optim import make_optimizer
from train.step import init_state

OPTIMIZER = make_optimizer(Optim(), optax.constant_schedule(0.1))


@pytest.fixture(scope="module")
def state():
    """A state no two of whose arrays are alike."""
    start = init_state(Tiny(), OPTIMIZER, (8, 8, 3), seed=0)
    leaves, tree = jax.tree.flatten(start)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(100 * rng.normal(size=x.shape), x.dtype) for x in leaves])


def at(state, step):
    return state.replace(step=jnp.asarray(step, jnp.int32))


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(at(state, 7), {"eval/top1": 0.5})
    assert (tmp_path / "checkpoints" / "7" / "state").is_dir()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(like=jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(at(state, 7)), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_the_latest_and_the_best_are_kept_across_restarts(tmp_path, state):
    for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.4), (4, 0.3), (5, 0.1)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(at(state, step), {"eval/top1": top1})
    assert steps_in(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 6))  # on a signal, there are no metrics
        checkpoints.wait()
        assert steps_in(tmp_path) == [2, 5, 6]
        checkpoints.save(at(state, 7), {"eval/top1": 0.9})
        checkpoints.wait()
        assert steps_in(tmp_path) == [6, 7], "of two equally good, the later is the best"


def test_saving_a_step_again_changes_nothing(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 3), {"eval/top1": 0.5})
        checkpoints.save(at(state, 3))
    assert steps_in(tmp_path) == [3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, state, value):
    broken = at(jax.tree.map(lambda x: x, state), 4)
    broken.params["fc"]["bias"] = broken.params["fc"]["bias"].at[3].set(value)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(broken)
        with pytest.raises(FloatingPointError, match=r"^params/fc/bias is not finite at step 4$"):
            checkpoints.wait()
        assert checkpoints.latest() is None


def test_no_checkpoint_is_an_error_that_says_where(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(ConfigError, match=f"^no checkpoint in {tmp_path}/"):
        checkpoints.restore(state)


def test_another_model_is_an_error_that_names_the_difference(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 3))
        other = init_state(Tiny(num_classes=7), OPTIMIZER, (8, 8, 3), seed=0)
        with pytest.raises(ConfigError, match=r"is of another model: .*fc/bias is \(10,\) float32 there, \(7,\) float32 here$"):
            checkpoints.restore(other)
        other = state.replace(params={"conv": state.params["conv"]})
        with pytest.raises(ConfigError, match=r"is of another model: params/bn/bias is \(8,\) float32 there, absent here$"):
            checkpoints.restore(other)
