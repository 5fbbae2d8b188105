"""Frozen stages, stochastic depth and dropout, AdamW and LAMB, and a run that ends early."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.test_step import OPTIM, assert_equal, batches_of, run
from tests.train.tiny import Tiny, final_arrays, final_state, work_with_tiny
from train.config import Config, Data, Optim
from train.config.fields import ConfigError
from train.main import main
from train.optim import at_step, make_optimizer
from train.run.metrics import epochs_without_progress, read_metrics
from train.step import share_key

SMALL = """
from train.config import Config, Data, Model, Optim

config = Config(
    epochs=3,
    data=Data(name="synthetic", image_size=8, batch_size=16, synthetic_train=48, synthetic_test=16),
    model=Model(drop_path=0.3, dropout=0.2),
    optim=Optim(lr=0.01, name="adamw", weight_decay=0.1, freeze=("stem",), ema=0.9),
)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder to work in, with `small.py`: 3 epochs of 3 steps of a tiny network."""
    return work_with_tiny(tmp_path, monkeypatch, SMALL)


def test_a_resumed_run_ends_in_the_same_bits_and_frozen_parts_never_move(small):
    """With AdamW, dropout, stochastic depth, a frozen stage and a moving average."""
    same_rate = ["--config", small, "--optim.schedule", "step"]
    assert main([*same_rate, "--workdir", "whole", "--epochs", "2"]) == 0
    assert main([*same_rate, "--workdir", "parts", "--epochs", "1"]) == 0
    begun = final_arrays("parts")
    assert main(["--workdir", "parts", "--resume", "--epochs", "2"]) == 0
    whole = final_arrays("whole")
    assert final_state("parts") == final_state("whole")
    assert main([*same_rate, "--workdir", "other", "--epochs", "2", "--model.drop-path", "0"]) == 0
    assert any((whole[name] != array).any() for name, array in final_arrays("other").items()), "drop_path has no effect"

    initial = jax.jit(lambda: Tiny().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))()
    frozen = {"params/conv/kernel": initial["params"]["conv"]["kernel"], "params/bn/scale": 1, "params/bn/bias": 0}
    for name, expected in (frozen | {"batch_stats/bn/mean": 0, "batch_stats/bn/var": 1}).items():
        np.testing.assert_array_equal(whole[name], begun[name])
        np.testing.assert_allclose(whole[name], expected, rtol=1e-5)
        np.testing.assert_allclose(whole[f"ema/{name}"], whole[name], rtol=1e-6)  # d · x + (1 - d) · x rounds
    assert (whole["params/fc/kernel"] != begun["params/fc/kernel"]).any()
    assert (whole["ema/params/fc/kernel"] != begun["ema/params/fc/kernel"]).any()


def test_other_frozen_stages_are_another_run(small, capsys):
    assert main(["--config", small, "--workdir", "a", "--epochs", "1"]) == 0
    assert main(["--workdir", "a", "--resume", "--optim.freeze", "head"]) == 2
    assert "holds a run with optim.freeze ('stem',), not ('head',)" in capsys.readouterr().err
    assert main(["--config", small, "--workdir", "b", "--optim.freeze", "layr1"]) == 2
    assert "optim.freeze: the network has no stage or module 'layr1'" in capsys.readouterr().err
    assert not Path("b").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.drop-path", "1"], "Model.drop_path must be at least 0 and under 1, found 1"),
        (["--optim.betas", "0.9"], "Optim.betas must be two numbers, each at least 0 and under 1"),
        (["--patience", "-1"], "Config.patience must be at least 0, found -1"),
    ],
)
def test_values_that_are_refused(small, capsys, flags, message):
    assert main(["--config", small, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_without_progress_ends_early(small, capsys):
    """With a rate near zero the accuracy never improves: the first test is the best. `--resume` says so again."""
    flags = ["--config", small, "--workdir", "a", "--optim.lr", "1e-12", "--epochs", "9", "--patience", "2"]
    assert main(flags) == 0
    tested = [line for line in read_metrics(Path("a/metrics.jsonl")) if "eval/top1" in line]
    assert [line["epoch"] for line in tested] == [1, 2, 3]
    said = "Ended after epoch 3 of 9: no better test accuracy for 2 epochs (patience)"
    assert said in capsys.readouterr().out
    assert Path("a/curves.png").exists()
    assert int(final_arrays("a")["step"]) == 9
    assert main(["--workdir", "a", "--resume"]) == 0
    assert said in capsys.readouterr().out
    assert main(["--workdir", "a", "--resume", "--patience", "3"]) == 0
    assert "Ended after epoch 4 of 9: no better test accuracy for 3 epochs" in capsys.readouterr().out


def test_epochs_without_progress(tmp_path):
    def after(*accuracies):
        lines = [f'{{"step": {i}, "epoch": {i}, "eval/top1": {value}}}\n' for i, value in enumerate(accuracies)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "epoch": 9, "train/top1": 1.0}\n')
        return epochs_without_progress(tmp_path)

    assert epochs_without_progress(tmp_path) == after() == after(0.5) == after(0.5, 0.6) == 0
    assert after(0.5, 0.5) == 1, "the same accuracy is no better one"
    assert after(0.2, 0.9, 0.8, 0.7, 0.9) == 3


@pytest.mark.usefixtures("x64")
def test_random_parts_of_the_network_follow_shares_not_devices():
    """One device with eight parts takes the step of eight devices, each with random values of its own."""
    model, batches = Tiny(dtype=jnp.float64, drop_path=0.4, dropout=0.3), batches_of(steps=2, size=16)
    eight = run(model, batches, 8, "shard_map", dtype=np.float64)
    one = run(model, batches, 1, "shard_map", optim=dataclasses.replace(OPTIM, accumulate=8), dtype=np.float64)
    assert_equal(one, eight, 1e-12)
    plain = run(Tiny(dtype=jnp.float64), batches, 8, "shard_map", dtype=np.float64)
    assert abs(plain[1][0]["loss"] - eight[1][0]["loss"]) > 1e-3


def test_every_share_has_a_key_of_its_own():
    keys = jax.random.split(jax.random.key(0), 4)
    numbers = {float(jax.random.uniform(key)) for key in (share_key(keys[:2]), share_key(keys[2:]), keys[0], keys[2])}
    assert len(numbers) == 4


PARAMS = {"kernel": jnp.asarray([[3.0, 4.0]]), "bias": jnp.asarray([2.0])}
GRADS = {"kernel": jnp.asarray([[0.6, -0.8]]), "bias": jnp.asarray([1.0])}


def updates_of(frozen=None, **fields):
    optimizer = make_optimizer(Optim(**fields), 0.1, frozen)
    updates, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return np.concatenate([updates["kernel"].ravel(), updates["bias"]]).tolist(), state


def test_adamw_decays_apart_from_the_gradient():
    """The first step of Adam is the sign of the gradient; the decay is rate × coefficient × parameter, as in PyTorch."""
    assert updates_of(name="adamw", weight_decay=0.0)[0] == pytest.approx([-0.1, 0.1, -0.1], rel=1e-5)
    assert updates_of(name="adamw", weight_decay=0.5)[0] == pytest.approx([-0.25, -0.1, -0.2], rel=1e-5)
    assert updates_of(name="adamw", weight_decay=0.5, decay_kernels_only=True)[0] == pytest.approx([-0.25, -0.1, -0.1], rel=1e-5)


def test_lamb_scales_by_the_ratio_of_norms():
    """‖p‖ / ‖u‖ · u with u = sign(g) + decay · p for kernels, sign(g) for biases, which are not decayed."""
    u = np.asarray([1 + 0.1 * 3, -1 + 0.1 * 4])
    expected = [*(-0.1 * 5 / np.linalg.norm(u) * u), -0.1 * 2]
    assert updates_of(name="lamb", weight_decay=0.1)[0] == pytest.approx(expected, rel=1e-5)


def test_betas_reach_the_optimizer():
    optimizer = make_optimizer(Optim(name="adamw", betas=(0.5, 0.9)), 0.1)
    state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[1]
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mu["bias"], 0.5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_what_is_frozen_has_no_update_and_no_state(name):
    updates, state = updates_of(frozen={"kernel": False, "bias": True}, name=name, weight_decay=0.1, clip_norm=1.0)
    assert updates[2] == 0
    assert all(updates[:2])
    assert not any(leaf.shape == (1,) for leaf in jax.tree.leaves(state)), "momentum of a frozen parameter"


def test_a_later_epoch_moves_the_schedule_alone():
    """Adam's own count corrects its averages, which begin anew."""
    optimizer = make_optimizer(Optim(name="adamw"), lambda _: 0.1)
    state = at_step(optimizer.init(PARAMS), jnp.int32(50))
    counts = [int(value) for _, value in optax.tree_utils.tree_get_all_with_path(state, "count")]
    assert sorted(counts) == [0, 50]
    sgd = at_step(make_optimizer(Optim(), lambda _: 0.1).init(PARAMS), jnp.int32(50))
    assert [int(value) for _, value in optax.tree_utils.tree_get_all_with_path(sgd, "count")] == [50]


def test_fields_in_a_config_file():
    config = Config(patience=3, optim=Optim(name="lamb", betas=(0.9, 0.98), freeze=("stem", "layer1")), data=Data())
    assert config.optim.freeze == ("stem", "layer1")
    with pytest.raises(ConfigError, match=r"Optim\.freeze must be a tuple of str"):
        Optim(freeze="stem")
