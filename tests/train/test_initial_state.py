"""What a run begins with: random weights, those of a file, another epoch."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scconv_jax
import train.setup
from scconv_jax.weights import torch_files
from tests.train.tiny import Tiny, create_tiny
from train.config import Config, ConfigError, Data, Model, Optim, make_plan
from train.initial_state import InitialState, initial_weights
from train.main import main
from train.optim import make_optimizer, make_schedule
from train.run.checkpoints import Checkpoints
from train.run.metrics import read_metrics

CONFIG = Config(epochs=3, data=Data(name="synthetic", image_size=8, batch_size=16, synthetic_train=80, synthetic_test=27))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights of the tiny network for 10 classes, and its values."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    variables = Tiny().init(jax.random.key(5), jnp.zeros((1, 8, 8, 3)), train=False)
    variables = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.125), variables)
    scconv_jax.save(path, variables, {"model": "tiny"})
    return path, variables


def start_of(config, num_classes=10):
    plan = make_plan(config, 80, devices=8)
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, plan))
    return InitialState(config, plan, Tiny(num_classes=num_classes), optimizer, (8, 8, 3))


def assert_same(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_weights_of_a_file_are_taken_as_they_are(weights, ema):
    path, variables = weights
    state, notes = start_of(Config(model=Model(init=str(path)), data=CONFIG.data, optim=Optim(ema=ema))).create()
    assert_same({"params": state.params, "batch_stats": state.batch_stats}, variables)
    assert notes == [f"Starting from {path}."]
    if ema:
        assert_same(state.ema, variables)


def test_a_head_of_other_classes_is_drawn_and_the_rest_taken(weights):
    path, variables = weights
    config = Config(model=Model(init=str(path)), data=CONFIG.data)
    drawn, _ = start_of(Config(data=CONFIG.data), num_classes=7).create()
    state, notes = start_of(config, num_classes=7).create()
    assert_same(state.params["fc"], drawn.params["fc"])
    assert_same(state.params["conv"], variables["params"]["conv"])
    assert_same(state.batch_stats, variables["batch_stats"])
    assert notes[1:] == ["The file's head has 10 classes, the network 7: fc keeps its initial values."]


def test_pretrained_is_the_weights_published_for_the_network(weights, monkeypatch):
    path, variables = weights
    load = scconv_jax.load_weights
    asked = []
    monkeypatch.setattr(
        scconv_jax, "load_weights", lambda source, like, **options: asked.append(source) or load(path, like, **options)
    )
    found, notes = initial_weights(Model(name="scnet50", init="pretrained"), variables)
    assert asked == ["scnet50"]
    assert_same(found, variables)
    assert notes == ["Starting from the published weights of scnet50."]


def test_pretrained_is_refused_where_nothing_was_published():
    expected = (
        r"^no weights were published for resnet50, only for scnet101, scnet50, scnet50_v1d\. Give a file instead: --init FILE$"
    )
    with pytest.raises(ConfigError, match=expected):
        initial_weights(Model(name="resnet50", init="pretrained"), {})


def test_which_weights_and_which_keys(weights, tmp_path):
    """Of two sets the chosen one; keys renamed; a parameter that is ignored stays as it was."""
    _, variables = weights
    entries = {f"net.{key}": value for key, value in scconv_jax.to_torch(variables).items()}
    entries = {key.replace("fc", "classifier"): value for key, value in entries.items()}
    both = {f"{name}.{key}": value * factor for name, factor in (("raw", 1), ("twin", 2)) for key, value in entries.items()}
    torch_files.write_zip(tmp_path / "x.pth", both)
    like = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), variables)
    model = Model(init=str(tmp_path / "x.pth"), init_key="twin", init_rename=("classifier", "fc"), init_ignore=("net.fc.bias",))
    found, notes = initial_weights(model, like)
    expected = jax.tree.map(lambda leaf: 2 * leaf, variables)
    expected["params"]["fc"]["bias"] = like["params"]["fc"]["bias"]
    assert_same(found, expected)
    assert notes[1:] == [
        "The keys were taken without their prefix 'net'.",
        "Ignored as asked, so that the network keeps its initial values: fc.bias.",
    ]
    with pytest.raises(ConfigError, match=r"holds several sets of weights.*Choose one by its key: --model\.init-key raw"):
        initial_weights(dataclasses.replace(model, init_key=""), like)
    with pytest.raises(
        ConfigError, match=r"init_rename must be pairs of a regular expression and its replacement, found \('a',\)"
    ):
        Model(init_rename=("a",))


def test_a_later_epoch_has_its_place_in_schedule_and_data():
    config = Config(epochs=3, start_epoch=2, data=CONFIG.data, optim=Optim(lr=1.0, schedule="step", drop_epochs=(1.0, 2.0)))
    start = start_of(config)
    state, _ = start.create()
    assert state.step == 10
    grads = jax.tree.map(jnp.ones_like, state.params)
    updates, _ = start.optimizer.update(grads, state.opt_state, jax.tree.map(jnp.zeros_like, state.params))
    np.testing.assert_allclose(updates["fc"]["bias"], -0.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.pth", "model.init 'nothing.pth': nothing.pth cannot be read: No such file or directory"),
        ("resnet.safetensors", "does not fit scnet20_small: it looks like resnet20_small"),
        ("other.safetensors", "the state dict does not fit"),
        ("broken.pth", "model.init 'broken.pth': "),
    ],
)
def test_weights_that_will_not_do_are_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    resnet = scconv_jax.create_model("resnet20_small")
    shapes = jax.eval_shape(lambda: resnet.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))
    scconv_jax.save("resnet.safetensors", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    scconv_jax.save("other.safetensors", {"params": {"stem": {"kernel": np.ones((3, 3, 3, 4), np.float32)}}})
    Path("broken.pth").write_bytes(b"PK\x03\x04 no more")
    model = scconv_jax.create_model("scnet20_small")
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))
    with pytest.raises(ConfigError) as raised:
        initial_weights(Model(name="scnet20_small", init=source), like)
    assert "\n" not in str(raised.value)
    assert message.lower() in str(raised.value).lower()
    assert len(str(raised.value)) < 600


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scconv_jax, "create_model", create_tiny)
    data = '"synthetic", image_size=8, batch_size=16, synthetic_train=80, synthetic_test=27'
    Path("small.py").write_text(f"from train.config import Config, Data\nconfig = Config(epochs=1, data=Data(name={data}))\n")
    return "small.py"


def test_from_the_command_line(small, weights, capsys):
    """Training says what it begins with; a run that goes on says that it does not begin again; -e tests the weights alone."""
    path, _ = weights
    assert main(["--config", small, "--init", str(path), "--evaluate"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        rf"^Starting from {path}\.\nscnet20_small on synthetic, step 0: test accuracy .* of 27\), top-5 .*, loss ", out
    )
    assert not Path("runs").exists()

    assert main(["--config", small, "--init", str(path), "--optim.lr", "1e-30", "--optim.weight-decay", "0"]) == 0
    assert f"\nStarting from {path}.\n" in capsys.readouterr().out
    untrained = float(re.search(r"loss ([\d.]+)", out)[1])
    with Checkpoints(Path("runs/small"), keep=1) as checkpoints:
        assert checkpoints.latest() == 5
    trained = read_metrics(Path("runs/small/metrics.jsonl"))[0]["train/loss"]
    assert trained == pytest.approx(untrained, rel=0.3)

    assert main(["--resume", "--config", small, "--init", "another.pth", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert f"changed since the run began: model.init: '{path}' → 'another.pth'" in out
    assert (
        "resuming from step 5 of 10\nThe weights are those of the checkpoint; model.init 'another.pth' is not loaded again."
        in out
    )


def test_weights_of_other_classes_can_be_trained_but_not_tested(small, weights, capsys):
    """The accuracy of a head that nobody trained says nothing."""
    path, _ = weights
    assert main(["--config", small, "--init", str(path), "--evaluate", "--data.synthetic-classes", "7"]) == 2
    reason = "The file's head has 10 classes, the network 7: fc keeps its initial values."
    assert capsys.readouterr().err == f"error: model.init '{path}' cannot be tested on these images. {reason}\n"


def test_ignored_weights_are_not_tested_and_stay_random_in_training(small, weights, capsys):
    path, _ = weights
    assert main(["--config", small, "--init", str(path), "--model.init-ignore", "fc.*", "--evaluate"]) == 2
    assert "cannot be tested on these images. Ignored as asked, so that the network keeps" in capsys.readouterr().err
    assert main(["--config", small, "--init", str(path), "--model.init-ignore", "fc.*"]) == 0
    assert "\nIgnored as asked, so that the network keeps its initial values: fc.bias, fc.weight.\n" in capsys.readouterr().out


@pytest.mark.parametrize("evaluate", [[], ["--evaluate"]])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "nothing.pth"], "model.init 'nothing.pth': "),
        (["--init", "http://127.0.0.1:9/x-00000000.pth"], "model.init 'http://127.0.0.1:9/x-00000000.pth': "),
        (["--pretrained", "-a", "resnet50"], "no weights were published for resnet50"),
    ],
)
def test_weights_that_will_not_do_are_found_before_images_are_listed(
    small, capsys, monkeypatch, tmp_path, flags, message, evaluate
):
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train.setup, "load_dataset", None)
    assert main(["--config", small, *flags, *evaluate]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_folder_that_is_not_there_is_found_before_weights_are_downloaded(small, capsys, monkeypatch):
    monkeypatch.setattr(scconv_jax, "load_weights", None)
    assert main(["--config", small, "--pretrained", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: data.dir: there is no folder ")
