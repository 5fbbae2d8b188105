"""Networks without a head from files, and back into files; metadata that `load` returns builds the network again."""

import logging

import jax
import numpy as np
import pytest

import scconv_jax
from scconv_jax.interop.recognition import template

NAME = "resnet20_small"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A PyTorch state dict of the network for 10 classes, and its variables."""
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: generator.uniform(0.5, 1, leaf.shape).astype(np.float32), template(scconv_jax.create_model(NAME))
    )
    scconv_jax.save(path, variables)
    return path, variables


@pytest.mark.parametrize("name", [NAME, None])
def test_the_head_is_left_out(file, caplog, name):
    path, variables = file
    with caplog.at_level(logging.WARNING, "scconv_jax"):
        model, found = scconv_jax.load_model(path, name, num_classes=0)
    assert model == scconv_jax.create_model(NAME, num_classes=0)
    assert "fc" not in found["params"]
    expected = {**variables, "params": {key: leaf for key, leaf in variables["params"].items() if key != "fc"}}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [record.getMessage() for record in caplog.records] == ["small.pth: num_classes=0: the file's head, fc, was left out."]


def test_a_file_without_head_gives_the_same_network_again(file, tmp_path, caplog):
    model, variables = scconv_jax.load_model(file[0], NAME, num_classes=0)
    path = tmp_path / "bare.safetensors"
    scconv_jax.save(path, variables, {"model": NAME, "arguments": {"num_classes": 0}})
    caplog.clear()
    with caplog.at_level(logging.WARNING, "scconv_jax"):
        again, found = scconv_jax.load_model(path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert not caplog.records
    loaded = scconv_jax.load(path)
    assert scconv_jax.create_model(loaded.metadata["model"], **loaded.metadata["arguments"]) == model
    with_head, _ = scconv_jax.load_model(path, num_classes=4)
    assert with_head.num_classes == 4


def test_convert_without_head(file, tmp_path, capsys):
    from scconv_jax.cli import main

    out = tmp_path / "bare.safetensors"
    assert main(["convert", str(file[0]), "--num-classes", "0", "--out", str(out)]) == 0
    assert "the file's head, fc, was left out" in capsys.readouterr().out
    variables, metadata = scconv_jax.load(out)
    assert metadata["arguments"]["num_classes"] == 0
    assert "fc" not in variables["params"]
