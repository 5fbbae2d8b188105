"""Networks for images of other than three channels, and weights for three channels in them (timm's rule)."""

import logging
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scconv_jax
from scconv_jax.cli import main
from scconv_jax.interop.recognition import STEMS, template
from scconv_jax.models.complexity import shorten
from scconv_jax.models.registry import MODELS

NAME = "resnet20_small"


@pytest.fixture(scope="module")
def rgb():
    generator = np.random.default_rng(0)
    shapes = template(scconv_jax.create_model(NAME))
    return jax.tree.map(lambda leaf: generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def file(rgb, tmp_path):
    scconv_jax.save(tmp_path / "rgb.pth", rgb)
    return tmp_path / "rgb.pth"


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_images_of_any_channels(name):
    model, _ = shorten(scconv_jax.create_model(name, in_channels=5))
    shapes = template(model)
    images = jax.ShapeDtypeStruct((1, 128, 128, 5), jnp.float32)
    assert jax.eval_shape(partial(model.apply, train=False), shapes, images).shape == (1, model.num_classes)
    stems = [leaf for key, leaf in scconv_jax.interop.conversion.shapes(shapes).items() if key in STEMS]
    assert [shape[1] for shape in stems] == [5]


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_weights_for_three_channels(rgb, file, channels, caplog):
    with caplog.at_level(logging.WARNING, "scconv_jax"):
        model, variables = scconv_jax.load_model(file, in_channels=channels)
    assert model == scconv_jax.create_model(NAME, num_classes=10, in_channels=channels)
    kernel = rgb["params"]["conv1"]["kernel"].transpose(3, 2, 0, 1)  # PyTorch's layout, as in timm's rule
    if channels == 1:
        expected, how = kernel.sum(1, keepdims=True), "summed"
    else:
        repeats = math.ceil(channels / 3)
        expected, how = np.tile(kernel, (1, repeats, 1, 1))[:, :channels] * (3 / channels), f"repeated and scaled by 3/{channels}"
    np.testing.assert_allclose(variables["params"]["conv1"]["kernel"], expected.transpose(2, 3, 1, 0), rtol=1e-6)
    note = f"The file's conv1.weight has 3 input channels, the network {channels}: the kernels were {how}."
    assert caplog.messages == [f"rgb.pth: {note}"]
    filled, notes = scconv_jax.load_weights(file, template(model))
    jax.tree.map(np.testing.assert_array_equal, filled, variables)
    assert notes == [note]


def test_a_grey_image_gives_what_it_gives_in_rgb(rgb, file):
    model, variables = scconv_jax.load_model(file, in_channels=1)
    grey = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 16, 1)), jnp.float32)
    ours = model.apply(variables, grey, train=False)
    expected = scconv_jax.create_model(NAME).apply(rgb, jnp.repeat(grey, 3, axis=-1), train=False)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_a_file_shows_its_channels(file, tmp_path, capsys):
    out = str(tmp_path / "grey.pth")
    assert main(["convert", str(file), "--in-channels", "1", "--out", out]) == 0
    assert "in_channels=1" in capsys.readouterr().out
    model, variables = scconv_jax.load_model(out)
    assert model == scconv_jax.create_model(NAME, num_classes=10, in_channels=1)
    again = str(tmp_path / "grey.safetensors")
    scconv_jax.save(again, variables, {"model": NAME, "arguments": {"in_channels": 1}})
    assert scconv_jax.load_model(again)[0] == model
    with pytest.raises(scconv_jax.ConversionError, match=r"conv1\.weight: \(16, 1, 3, 3\) in the state dict, \(16, 3, 3, 3\)"):
        scconv_jax.load_model(out, in_channels=3)


@pytest.mark.parametrize(
    ("channels", "message"),
    [(3, r"got \(1, 32, 32, 1\)\. For images of 1 channels, create the network with in_channels=1\."), (1, "")],
)
@pytest.mark.usefixtures("unchecked")
def test_images_of_other_channels(channels, message):
    model = scconv_jax.create_model(NAME, in_channels=channels)
    call = partial(jax.eval_shape, partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    if message:
        with pytest.raises(ValueError, match=message):
            call()
    else:
        call()


@pytest.mark.parametrize("channels", [0, True, 1.0, "3"])
@pytest.mark.usefixtures("unchecked")
def test_impossible_channels(channels):
    with pytest.raises(ValueError, match=r"in_channels=.* must be one positive integer\."):
        scconv_jax.create_model(NAME, in_channels=channels)
