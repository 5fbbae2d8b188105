"""From files of weights to variables: what is loaded, what is left out, which notes there are."""

import logging
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from scconv_jax import ConversionError, WeightsError, create_model, load, load_model, load_weights, save, to_torch
from scconv_jax.interop.recognition import template

NAME = "scnet20_small"


def filled(name=NAME, seed=0, **options):
    """Variables of a network, random throughout."""
    shapes = template(create_model(name, **options))
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def variables():
    return filled()


@pytest.fixture
def write(tmp_path):
    """Writes a state dict as a `.safetensors` file of PyTorch's naming."""

    def to_file(state_dict, name="weights.safetensors"):
        path = tmp_path / name
        safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in state_dict.items()}, path)
        return path

    return to_file


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_model_in_one_line(write, variables):
    path = write(to_torch(variables))
    model, found = load_model(path)
    assert model == create_model(NAME, num_classes=10)
    equal(found, variables)


def test_options_go_to_the_model(write, variables):
    model, _ = load_model(write(to_torch(variables)), NAME, dtype=jnp.bfloat16)
    assert model == create_model(NAME, num_classes=10, dtype=jnp.bfloat16)


def test_our_own_files_say_what_they_are(tmp_path):
    """The paper's ScConv has the entries of the public code's: only what the file says can tell."""
    path = tmp_path / "own.safetensors"
    expected = filled("scconv_resnet20_small", num_classes=7)
    save(path, expected, {"model": "scconv_resnet20_small", "arguments": {"num_classes": 7, "variant": "paper"}})
    model, found = load_model(path)
    assert repr(model) == repr(create_model("scconv_resnet20_small", num_classes=7, variant="paper"))
    equal(found, expected)
    save(path, expected)
    assert repr(load_model(path)[0]) == repr(create_model("scconv_resnet20_small", num_classes=7, variant="2023-10"))
    assert repr(load_model(path, variant="paper")[0]) == repr(
        create_model("scconv_resnet20_small", num_classes=7, variant="paper")
    )


@pytest.mark.parametrize("classes", [10**12, -1, "many", 1.5, None])
def test_a_file_cannot_ask_for_a_head_that_it_does_not_have(tmp_path, variables, classes):
    save(tmp_path / "x.safetensors", variables, {"model": NAME, "arguments": {"num_classes": classes}})
    model, found = load_model(tmp_path / "x.safetensors")
    assert model == create_model(NAME, num_classes=10)
    equal(found, variables)


@pytest.mark.parametrize(
    "arguments",
    [
        {"nope": 1},
        {"name": "x"},
        {"planes": [4, 4, -4]},
        {"frozen": ["x"]},
        {"planes": "x"},
        {"planes": 10**9},
        {"stem": 7},
        {"output_stride": "8"},
        {"dtype": 3},
    ],
    ids=str,
)
def test_options_in_a_file_that_make_no_network(tmp_path, variables, arguments):
    save(tmp_path / "x.safetensors", variables, {"model": NAME, "arguments": arguments})
    with pytest.raises(WeightsError, match=rf"x\.safetensors claims to be {NAME} with .*, which cannot be built: "):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("classes", [10**11, 3])
def test_a_file_without_a_head_cannot_ask_for_one_that_fills_the_memory(tmp_path, variables, classes):
    params = {key: value for key, value in variables["params"].items() if key != "fc"}
    save(tmp_path / "x.safetensors", {**variables, "params": params}, {"model": NAME, "arguments": {"num_classes": classes}})
    model, found = load_model(tmp_path / "x.safetensors")
    assert model == create_model(NAME)
    equal(
        {**found, "params": {key: value for key, value in found["params"].items() if key != "fc"}},
        {**variables, "params": params},
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("wrn28_10_small", {"depth": 4 + 6 * 10**6}), ("densenet121_small", {"block_sizes": [1, 10**7]})],
)
def test_a_file_cannot_ask_for_a_network_without_end(tmp_path, variables, name, arguments):
    save(tmp_path / "x.safetensors", variables, {"model": name, "arguments": arguments})
    with pytest.raises(WeightsError, match=r"which cannot be built: it has more layers than the file has entries"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("wrn28_10_small", {"depth": 10, "width": 1}),
        ("densenet121_small", {"block_sizes": (1, 2), "growth": 4}),
        ("resnet20_small", {"planes": [4, 4, 8], "frozen": ["stem"], "dtype": "bfloat16"}),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_file_says_the_structure_of_its_network(tmp_path, name, arguments):
    weights = filled(name, num_classes=3, **arguments)
    save(tmp_path / "x.safetensors", weights, {"model": name, "arguments": arguments})
    loaded, variables = load_model(tmp_path / "x.safetensors")
    assert loaded == create_model(name, num_classes=3, **arguments)
    metadata = load(tmp_path / "x.safetensors").metadata  # as its docstring says
    assert create_model(metadata["model"], num_classes=3, **metadata["arguments"]) == loaded
    jax.tree.map(np.testing.assert_array_equal, variables, weights)


def test_options_in_a_file_are_shown_in_one_line(tmp_path, variables):
    save(tmp_path / "x.safetensors", variables, {"model": NAME, "arguments": '{"stem":\n\n\n7}'})
    with pytest.raises(WeightsError, match=r'with {"stem": 7}, which cannot be built') as error:
        load_model(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("scnet5", " Did you mean 'scnet50'?"), ("scnet_101", " Did you mean 'scnet101'?"), ("mine", "")]
)
def test_a_misspelt_name(name, hint):
    with pytest.raises(
        WeightsError, match=rf"^'{name}' is neither a published .*, and there is no such file or folder\.{re.escape(hint)}$"
    ):
        load_model(name)


def test_another_head_keeps_the_templates_values(write, variables):
    start = filled(seed=1, num_classes=3)
    found, notes = load_weights(write(to_torch(variables)), start)
    assert notes == ["The file's head has 10 classes, the network 3: fc keeps its initial values."]
    equal(found, {**variables, "params": {**variables["params"], "fc": start["params"]["fc"]}})


def test_another_head_of_which_there_are_only_shapes_is_drawn(write, variables, caplog):
    with caplog.at_level(logging.WARNING, "scconv_jax"):
        model, found = load_model(write(to_torch(variables)), num_classes=3)
    assert model == create_model(NAME, num_classes=3)
    assert found["params"]["fc"]["kernel"].shape == (256, 3)
    assert np.std(found["params"]["fc"]["kernel"]) > 0.01
    assert "weights.safetensors: The file's head has 10 classes, the network 3: fc keeps its initial values." in caplog.text


def test_no_head(write, variables):
    state_dict = {name: value for name, value in to_torch(variables).items() if not name.startswith("fc.")}
    start = filled(seed=1)
    found, notes = load_weights(write(state_dict), start)
    assert notes == ["The file has no head: fc, of 10 classes, keeps its initial values."]
    np.testing.assert_array_equal(found["params"]["fc"]["kernel"], start["params"]["fc"]["kernel"])


def test_half_a_head_is_an_error(write, variables):
    state_dict = {name: value for name, value in to_torch(variables).items() if name != "fc.weight"}
    with pytest.raises(ConversionError, match=r"1 entries are missing:\n  fc\.weight"):
        load_weights(write(state_dict), variables)


def test_every_other_difference_is_an_error(write, variables):
    state_dict = to_torch(variables)
    state_dict["layer1.0.conv3.weigth"] = state_dict.pop("layer1.0.conv3.weight")
    with pytest.raises(ConversionError, match=r"layer1\.0\.conv3\.weigth .*nearest: layer1\.0\.conv3\.weight"):
        load_weights(write(state_dict), variables)
    found, _ = load_weights(write(state_dict), variables, rename=[("weigth$", "weight")])
    equal(found, variables)
    with pytest.raises(ConversionError, match=r"No model here has the keys and shapes of .*weights\.safetensors"):
        load_model(write(state_dict))


def test_another_network_is_named(write, variables):
    path = write(to_torch(variables))
    with pytest.raises(ConversionError, match="does not fit resnet20_small: it looks like scnet20_small"):
        load_model(path, "resnet20_small")
    with pytest.raises(ValueError, match="There is no model 'scnet20'"):
        load_model(path, "scnet20")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_the_templates(write, variables, dtype):
    state_dict = {name: value.astype(dtype) if value.ndim else value for name, value in to_torch(variables).items()}
    found, notes = load_weights(write(state_dict), variables)
    leaves = jax.tree.leaves(found)
    assert notes == [f"{len(leaves)} entries were converted from {np.dtype(dtype)} to float32."]
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-7), found, variables)
    if dtype == np.float64:
        equal(found, variables)


def test_values_beyond_float32_are_refused(write, variables):
    state_dict = to_torch(variables)
    state_dict["bn1.weight"] = np.full(16, 1e300)
    with pytest.raises(ConversionError, match="beyond the range of float32"):
        load_weights(write(state_dict), variables)


def test_integers_are_refused(write, variables):
    state_dict = to_torch(variables)
    state_dict["bn1.weight"] = np.ones(16, np.int8)
    with pytest.raises(ConversionError, match=r"not: bn1\.weight \(int8\)\. Quantised weights cannot be converted"):
        load_weights(write(state_dict), variables)


def test_nothing_there(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.pth"):
        load_model(tmp_path / "nowhere.pth")
