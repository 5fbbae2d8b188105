"""`python -m scconv_jax convert`: its files, its table, and that bad input leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from scconv_jax import __version__, create_model, load, load_weights, save, to_torch
from scconv_jax.cli import main
from scconv_jax.interop.recognition import template
from scconv_jax.weights.files import sha256


def filled(name, **options):
    shapes = template(create_model(name, **options))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def variables():
    return filled("scnet20_small")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, state_dict):
    safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in state_dict.items()}, path)


def convert(capsys, *arguments):
    """Runs the command; returns its table, spaces and lines squeezed."""
    code = main(["convert", *arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.err == ""
    return " ".join(printed.out.replace("│", " ").split())


def test_over_and_back_bit_for_bit(capsys, variables):
    save("theirs.pth", variables)
    convert(capsys, "theirs.pth", "--out", "ours.safetensors")
    found, metadata = load("ours.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert metadata == {
        "model": "scnet20_small",
        "arguments": {"num_classes": 10},
        "source": "theirs.pth",
        "source_sha256": sha256(Path("theirs.pth")),
        "naming": "reference",
        "version": f"scconv_jax {__version__}",
    }
    table = convert(capsys, "ours.safetensors", "--out", "again.pth")
    assert "flax: Flax keys of this project" in table
    with open("theirs.pth", "rb") as first, open("again.pth", "rb") as second:
        assert first.read() == second.read()


def test_the_table(capsys, variables):
    save("theirs.pth", variables)
    table = convert(capsys, "theirs.pth", "--out", "ours.safetensors")
    entries = to_torch(variables)
    counters = sum(name.endswith("num_batches_tracked") for name in entries)
    for text in (
        "theirs.pth → ours.safetensors",
        f"SHA-256 {sha256(Path('theirs.pth'))}",
        "key convention reference: SCNet of MCG-NKU/SCNet (recognised)",
        "network scnet20_small, num_classes=10 (recognised)",
        f"entries {len(entries)} read, {len(entries) - counters} converted, {counters} ignored",
        f"ignored {counters} num_batches_tracked, PyTorch's counters",
        "parameters 220,826",
        f"SHA-256 {sha256(Path('ours.safetensors'))}",
        "time ",
    ):
        assert text in table
    assert "note" not in table


def test_how_the_version_of_scconv_is_known(capsys):
    save("scconv.pth", filled("scconv_resnet20_small"))
    both = "recognised, or --variant paper, which has the same keys"
    assert f"num_classes=10 ({both})" in convert(capsys, "scconv.pth", "--out", "a.safetensors")
    given = convert(capsys, "scconv.pth", "--variant", "paper", "--out", "paper.safetensors")
    assert "(recognised, variant as given)" in given
    assert "variant=2023-10, num_classes=10 (recognised)" in convert(capsys, "a.safetensors", "--out", "again.pth")


def test_another_number_of_classes(capsys, variables):
    save("theirs.pth", variables)
    table = convert(capsys, "theirs.pth", "--num-classes", "3", "--out", "ours.safetensors")
    assert "note The file's head has 10 classes, the network 3: fc keeps its initial values." in table
    assert "initial values fc.weight, fc.bias" in table
    assert "which Flax does not have; fc.weight, fc.bias: the head keeps its initial values" in table
    found, metadata = load("ours.safetensors")
    assert metadata["arguments"] == {"num_classes": 3}
    assert found["params"]["fc"]["kernel"].shape == (256, 3)


def test_output_stride_is_kept_for_later(capsys):
    save("theirs.pth", filled("resnet50", num_classes=2))
    convert(capsys, "theirs.pth", "--output-stride", "8", "--out", "ours.safetensors")
    assert load("ours.safetensors").metadata["arguments"] == {"num_classes": 2, "output_stride": 8}


def test_values_that_are_not_finite(capsys, variables):
    state_dict = to_torch(variables)
    state_dict["bn1.weight"][:3] = np.nan
    state_dict["bn1.bias"][0] = np.inf
    write("theirs.safetensors", state_dict)
    table = convert(capsys, "theirs.safetensors", "--out", "ours.safetensors")
    assert "note 4 values are NaN or infinite, in bn1.bias, bn1.weight. They are kept." in table


def test_a_naming_and_names_of_ones_own(capsys, variables):
    state_dict = {f"net.{name}": value for name, value in to_torch(variables).items()}
    state_dict["loss.center"] = np.zeros(3, np.float32)
    write("theirs.safetensors", state_dict)
    arguments = ["--naming", "reference", "--rename", r"^net\.", "", "--ignore", "loss.*"]
    table = convert(capsys, "theirs.safetensors", *arguments, "--out", "ours.safetensors")
    assert "reference: SCNet of MCG-NKU/SCNet (as given)" in table
    assert "loss.center: skipped (loss.*)" in table
    jax.tree.map(np.testing.assert_array_equal, load("ours.safetensors").variables, variables)


def test_which_of_two_sets_of_weights(capsys, variables):
    entries = to_torch(variables)
    twice = {f"ema_model.{name}": value * np.asarray(2, value.dtype) for name, value in entries.items()}
    write("both.safetensors", {**{f"model.{name}": value for name, value in entries.items()}, **twice})
    table = convert(capsys, "both.safetensors", "--out", "ours.safetensors")
    counters = sum(name.endswith("num_batches_tracked") for name in entries)
    assert (
        f"entries {2 * len(entries)} read, {len(entries) - counters} converted, {counters} ignored, {len(twice)} beside" in table
    )
    assert "note The keys were taken without their prefix 'model'." in table
    jax.tree.map(np.testing.assert_array_equal, load("ours.safetensors").variables, variables)
    table = convert(capsys, "both.safetensors", "--key", "ema_model", "--out", "average.safetensors")
    assert "note" not in table
    average = load("average.safetensors").variables["params"]["fc"]["bias"]
    np.testing.assert_array_equal(average, 2 * variables["params"]["fc"]["bias"])
    assert main(["convert", "both.safetensors", "--key", "ema", "--out", "none.safetensors"]) == 2
    assert "no weights under the key 'ema'. Did you mean 'ema_model'? Its keys: " in capsys.readouterr().err


def test_no_network_at_all(capsys):
    """A network of one's own with ScConv in it, in all three versions: each entry by its kind, names as they are."""
    generator = np.random.default_rng(0)

    def random(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    state_dict = {
        "stem.weight": random(8, 3, 3, 5),
        "stem.bias": random(8),
        "norm.weight": random(8),
        "norm.bias": random(8),
        "norm.running_mean": random(8),
        "norm.running_var": random(8),
        "norm.num_batches_tracked": np.array(7),
        "a.SRU.gn.gamma": random(8, 1, 1),
        "a.SRU.gn.beta": random(8, 1, 1),
        "b.SRU.gn.weight": random(8, 1, 1),
        "b.SRU.gn.bias": random(8, 1, 1),
        "c.SRU.gn.weight": random(8),
        "c.CRU.GWC.weight": random(8, 2, 3, 3),
        "fc.weight": random(2, 8),
    }
    write("own.safetensors", state_dict)
    table = convert(capsys, "own.safetensors", "--model", "any", "--out", "ours.safetensors")
    assert "network none: each entry converted by its kind (as given)" in table
    found, metadata = load("ours.safetensors")
    assert "model" not in metadata
    params, expected = found["params"], state_dict
    np.testing.assert_array_equal(params["stem"]["kernel"], expected["stem.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["fc"]["kernel"], expected["fc.weight"].T)
    np.testing.assert_array_equal(params["b"]["SRU"]["gn"]["scale"], expected["b.SRU.gn.weight"])
    np.testing.assert_array_equal(params["a"]["SRU"]["gn"]["gamma"], expected["a.SRU.gn.gamma"])
    np.testing.assert_array_equal(found["batch_stats"]["norm"]["var"], expected["norm.running_var"])
    convert(capsys, "ours.safetensors", "--model", "any", "--out", "again.pth")
    same, notes = load_weights("again.pth", found)
    assert notes == []
    jax.tree.map(np.testing.assert_array_equal, same, found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "--out", "new.safetensors"], "nowhere.pth"),
        (
            ["theirs.pth", "--out", "new.onnx"],
            "--out new.onnx: its name must end in .safetensors, .pth or .pt, to give the format",
        ),
        (["theirs.pth", "--out", "kept.safetensors"], "kept.safetensors exists. Give --force to replace it, or another --out."),
        (["theirs.pth", "--out", "x" * 300 + ".pth"], "File name too long"),
        (["theirs.pth", "--rename", "(", "", "--out", "new.pth"], "missing ), unterminated subpattern"),
        (
            ["theirs.pth", "--num-classes", "-1", "--out", "new.pth"],
            "num_classes=-1 must be 0, for no head, or a positive integer.",
        ),
        (["scnet5", "--out", "new.pth"], "Did you mean 'scnet50'?"),
        (["theirs.pth", "--out", "no/new.pth"], "There is no folder no to write new.pth in; make it first."),
        (
            ["theirs.pth", "--model", "resnet20_small", "--out", "new.pth"],
            "does not fit resnet20_small: it looks like scnet20_small",
        ),
        (
            ["theirs.pth", "--model", "scnet20_smal", "--out", "new.pth"],
            "There is no model 'scnet20_smal'. Did you mean 'scnet20_small'",
        ),
        (
            ["theirs.pth", "--naming", "torchvison", "--out", "new.pth"],
            "There is no key convention 'torchvison'. Did you mean 'torchvision'?",
        ),
        (
            ["theirs.pth", "--output-stride", "5", "--out", "new.pth"],
            "output_stride=5 is not possible for this network. It can be 4",
        ),
        (["theirs.pth", "--variant", "paper", "--out", "new.pth"], "Model 'scnet20_small' has no option 'variant'."),
        (["other.safetensors", "--out", "new.pth"], "No model here has the keys and shapes of other.safetensors"),
        (["broken.pth", "--out", "new.pth"], "broken.pth"),
        (
            ["cube.safetensors", "--model", "any", "--out", "new.pth"],
            "Entry x.weight of shape (2, 2, 2) cannot be converted without a network",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_leaves_nothing(capsys, tmp_path, variables, arguments, message):
    save("theirs.pth", variables)
    write("other.safetensors", {"encoder.weight": np.zeros((2, 2), np.float32)})
    write("cube.safetensors", {"x.weight": np.zeros((2, 2, 2), np.float32)})
    (tmp_path / "kept.safetensors").write_bytes(b"kept")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    before = sorted(tmp_path.iterdir())
    assert main(["convert", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("scconv-jax: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "kept.safetensors").read_bytes() == b"kept"


def test_every_difference_is_listed(capsys, tmp_path, variables):
    state_dict = to_torch(variables)
    state_dict["layer1.0.conv3.weigth"] = state_dict.pop("layer1.0.conv3.weight")
    state_dict["bn1.bias"] = np.zeros(3, np.float32)
    write("theirs.safetensors", state_dict)
    assert main(["convert", "theirs.safetensors", "--model", "scnet20_small", "--out", "new.pth"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "  layer1.0.conv3.weigth (64, 16, 1, 1) (nearest: layer1.0.conv3.weight)" in lines
    assert "  bn1.bias: (3,) in the state dict, (16,) expected" in lines
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(OSError(28, "No space left on device"), 2, "No space left on device"), (KeyboardInterrupt(), 130, "interrupted")],
    ids=["full disk", "Ctrl-C"],
)
def test_an_interruption_while_writing_leaves_what_was_there(monkeypatch, tmp_path, variables, capsys, error, code, message):
    save("theirs.pth", variables)
    (tmp_path / "kept.safetensors").write_bytes(b"kept")

    def stop(*_):
        raise error

    monkeypatch.setattr("os.fsync", stop)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", "theirs.pth", "--out", "kept.safetensors", "--force"]) == code
    assert message in capsys.readouterr().err
    assert (tmp_path / "kept.safetensors").read_bytes() == b"kept"
    assert sorted(tmp_path.iterdir()) == before


def test_an_encoding_without_the_tables_frames(variables):
    save("theirs.pth", variables)
    command = [sys.executable, "-m", "scconv_jax", "convert", "theirs.pth", "--out", "ours.safetensors"]
    run = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert b"scnet20_small" in run.stdout
    assert run.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no file that is always full")
def test_output_that_cannot_be_written(variables):
    save("theirs.pth", variables)
    command = [sys.executable, "-m", "scconv_jax", "convert", "theirs.pth", "--out", "ours.safetensors"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in run.stderr
    assert "No space left on device" in run.stderr


def test_as_a_program(variables):
    save("theirs.pth", variables)
    command = [sys.executable, "-m", "scconv_jax", "convert", "theirs.pth", "--out", "ours.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "scnet20_small" in run.stdout
    header = safetensors.safe_open("ours.safetensors", "np").metadata()
    assert json.loads(header["arguments"]) == {"num_classes": 10}


def test_back_to_pytorch_under_other_names(capsys, variables):
    """A network of one's own: the names change on the way in and on the way back. Counts are those of the file."""
    save("theirs.pth", variables)
    convert(capsys, "theirs.pth", "--model", "any", "--rename", "^", "net.", "--out", "ours.safetensors")
    assert list(load("ours.safetensors").variables["params"]) == ["net"]
    count = len(safetensors.numpy.load_file("ours.safetensors"))
    printed = convert(capsys, "ours.safetensors", "--model", "any", "--rename", r"^net\.", "", "--out", "back.pth")
    assert f"{count} read, {count} converted, 0 ignored" in printed
    convert(capsys, "back.pth", "--out", "again.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load("again.safetensors").variables, variables)
    assert main(["convert", "ours.safetensors", "--model", "any", "--rename", "weight$", "w", "--out", "bad.pth"]) == 2
    assert "rename may change only the names of modules" in capsys.readouterr().err
