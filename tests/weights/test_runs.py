"""A training run's folder: its steps, and its checkpoints read as weights."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scconv_jax
from scconv_jax import runs, weights
from scconv_jax.weights.files import WeightsError
from tests.train.tiny import Tiny
from train.config import Optim
from train.optim import make_optimizer
from train.run.checkpoints import Checkpoints
from train.step import init_state

OPTIMIZER = make_optimizer(Optim(), optax.constant_schedule(0.1))


def state(step, ema=False):
    start = jax.eval_shape(lambda: init_state(Tiny(), OPTIMIZER, (8, 8, 3), seed=0, ema=ema))
    leaves, tree = jax.tree.flatten(start)
    numbers = np.random.default_rng(step)
    made = jax.tree.unflatten(tree, [jnp.asarray(numbers.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])
    return made.replace(step=jnp.asarray(step, jnp.int32))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three steps; the second is the best."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.4)):
            checkpoints.save(state(step), {"eval/top1": top1})
    (folder / "config.json").write_text(json.dumps({"model": {"name": "scnet20_small"}}))
    return folder


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("inside", "step"), [(".", 2), ("checkpoints", 2), ("checkpoints/3", 3), ("checkpoints/1/state", 1)], ids=str
)
def test_a_run_or_one_of_its_steps(run, inside, step):
    variables, metadata = scconv_jax.load(run / inside)
    expected = state(step)
    assert_same(variables, {"params": expected.params, "batch_stats": expected.batch_stats})
    classes = expected.params["fc"]["kernel"].shape[1]
    assert metadata == {"model": "scnet20_small", "arguments": {"num_classes": classes}, "step": str(step)}


def test_which_step_was_taken_is_said_if_there_is_a_choice(run, tmp_path):
    template = {"params": state(2).params, "batch_stats": state(2).batch_stats}
    said = f"The best checkpoint, of step 2, was taken. The latest is {run}/checkpoints/3."
    for folder in (run, run / "checkpoints"):
        assert said in scconv_jax.load_weights(folder, template)[1]
    for folder in (run / "checkpoints" / "2", run / "checkpoints" / "3" / "state"):
        assert not any("checkpoint" in note for note in scconv_jax.load_weights(folder, template)[1])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(1), {"eval/top1": 0.5})
    assert scconv_jax.load_weights(tmp_path, template)[1] == []


def test_the_source_describes_the_run(run):
    source = weights.read(run)
    assert (source.format, source.is_flax, source.path) == ("orbax", True, run)
    assert source.bytes > 0
    assert set(source.skipped) >= {"opt_state", "step"}
    assert not set(source.skipped) & {"params", "batch_stats"}


def test_a_moving_average_is_taken(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(1, ema=True), {"eval/top1": 0.5})
    assert_same(scconv_jax.load(tmp_path).variables, state(1, ema=True).ema)
    assert "params" in weights.read(tmp_path).skipped


def test_a_step_without_metrics_and_a_run_without_a_config(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state(1))
        checkpoints.save(state(2))
    assert scconv_jax.load(tmp_path).metadata == {"step": "2"}
    (tmp_path / "config.json").write_text("{" * 10)
    assert scconv_jax.load(tmp_path).metadata == {"step": "2"}
    (tmp_path / "config.json").write_text('{"model": {"name": "x"}}', encoding="utf-8-sig")  # as some editors save it
    assert scconv_jax.load(tmp_path).metadata["model"] == "x"


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_the_steps_of_a_run(run, inside):
    folder = run / inside
    assert runs.steps(folder) == [1, 2, 3]
    assert (runs.best_step(folder), runs.latest_step(folder)) == (2, 3)
    assert [runs.eval_top1(folder, step) for step in (1, 2, 3, 4)] == [0.2, 0.9, 0.4, None]


def test_the_later_of_equally_good_steps_is_the_best(tmp_path):
    for step, top1 in ((1, 0.5), (2, 0.5), (3, 0.4), (4, None), (10, 0.5)):
        folder = tmp_path / "checkpoints" / str(step) / "metrics"
        folder.mkdir(parents=True)
        if top1 is not None:
            (folder / "metrics").write_text(json.dumps({"eval/top1": top1}))
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    assert runs.steps(tmp_path) == [1, 2, 3, 4, 10]
    assert (runs.best_step(tmp_path), runs.latest_step(tmp_path)) == (10, 10)


def test_damaged_metrics_count_as_none(tmp_path):
    (tmp_path / "checkpoints" / "1" / "metrics").mkdir(parents=True)
    for text in ("{", "{}", "[]", '{"eval/top1": null}', '{"eval/top1": "x"}'):
        (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text(text)
        assert runs.eval_top1(tmp_path, 1) is None
        assert runs.best_step(tmp_path) is None


def test_a_folder_without_steps(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert runs.steps(folder) == []
        assert runs.best_step(folder) is runs.latest_step(folder) is None


def test_a_whole_training_state_is_restored(run):
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state(3))
    assert_same(runs.restore(run / "checkpoints" / "3" / "state", like), jax.tree.map(np.asarray, state(3)))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(WeightsError, match=r"not a training run: it has no checkpoints/STEP/state"):
        weights.read(tmp_path)
    (tmp_path / "7").mkdir()
    with pytest.raises(WeightsError, match=r"not a training run: it has no checkpoints/7/state"):
        weights.read(tmp_path)


def test_a_damaged_checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "1", tmp_path / "1")
    described = tmp_path / "1" / "state" / "_METADATA"
    described.write_bytes(described.read_bytes()[:20])
    with pytest.raises(WeightsError, match="its checkpoint 1 is damaged"):
        weights.read(tmp_path / "1")


def test_without_orbax(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(WeightsError, match=r"pip install 'scconv-jax\[train\]'"):
        weights.read(run)


def test_the_weights_beside_a_moving_average(tmp_path, run):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(1, ema=True), {"eval/top1": 0.5})
    kept = state(1, ema=True)
    expected = {"params": kept.params, "batch_stats": kept.batch_stats}
    assert_same(weights.read(tmp_path, "params").variables, expected)
    assert_same(weights.read(tmp_path, "ema").variables, kept.ema)
    with pytest.raises(WeightsError, match=r"no weights under the key 'best', but params and ema\.$"):
        weights.read(tmp_path, "best")
    with pytest.raises(WeightsError, match=r"no weights under the key 'ema', but params\.$"):
        weights.read(run, "ema")
