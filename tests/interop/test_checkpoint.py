"""Keys of files: what wrappers insert, prefixes, the user's renames, entries beside the network."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from scconv_jax import ConversionError, create_model, load_model, load_weights, to_torch
from scconv_jax.interop.checkpoint import open_checkpoint
from scconv_jax.interop.loading import build_model
from tests.interop.test_loading import NAME, equal, filled


@pytest.fixture(scope="module")
def variables():
    return filled()


@pytest.fixture(scope="module")
def entries(variables):
    return to_torch(variables)


@pytest.fixture
def write(tmp_path):
    def to_file(state_dict):
        arrays = {key: np.ascontiguousarray(value) for key, value in state_dict.items()}
        safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
        return tmp_path / "x.safetensors"

    return to_file


def prefixed(prefix, entries, factor=1):
    return {prefix + key: value * np.asarray(factor, value.dtype) for key, value in entries.items()}


def load(path, variables, **options):
    """Load as a network and into variables; return the notes, which are the same."""
    loaded = build_model(open_checkpoint(path, **options), None, {})
    assert loaded.name == NAME
    assert loaded.options == {"num_classes": 10}
    equal(loaded.variables, variables)
    found, notes = load_weights(path, jax.tree.map(np.zeros_like, variables), **options)
    equal(found, variables)
    assert notes == loaded.notes
    return notes


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "module.module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_forward_module._orig_mod.module."],
)
def test_wrappers_of_the_whole_network(write, entries, variables, wrapper):
    assert load(write(prefixed(wrapper, entries)), variables) == []


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module", "_fpw_module"]
)
def test_wrappers_in_the_middle_of_keys(write, entries, variables, wrapper):
    wrapped = {
        key.replace("layer1.0.", f"layer1.0.{wrapper}.").replace("layer2.", f"layer2.{wrapper}."): value
        for key, value in entries.items()
    }
    assert load(write(wrapped), variables) == []


def test_a_part_of_the_network_in_data_parallel(write, entries, variables):
    wrapped = {key.replace("layer2.", "layer2.module."): value for key, value in entries.items()}
    assert load(write(wrapped), variables) == []


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "backbone.", "model.module.", "student.encoder._orig_mod.", "_orig_mod.model.", "layer1.", "a.b.c."],
)
def test_a_prefix_of_all_keys(write, entries, variables, prefix):
    shown = prefix.replace("_orig_mod.", "")[:-1]
    assert load(write(prefixed(prefix, entries)), variables) == [f"The keys were taken without their prefix {shown!r}."]


def test_a_prefix_where_the_network_is_named(write, entries, variables):
    path = write(prefixed("model.", entries))
    model, found = load_model(path, NAME)
    assert model == create_model(NAME, num_classes=10), "the head is found below the prefix, and its classes with it"
    equal(found, variables)
    with pytest.raises(ConversionError, match="does not fit resnet20_small: it looks like scnet20_small"):
        load_model(path, "resnet20_small")


def test_a_lightning_module(write, entries, variables):
    state_dict = {
        **prefixed("model.", entries),
        **prefixed("ema_model.", entries, 2),
        "criterion.weight": np.ones(10, np.float32),
        "accuracy.correct": np.array(7),
    }
    path = write(state_dict)
    assert load(path, variables) == [
        "The keys were taken without their prefix 'model'.",
        "Other prefixes that fit: ema_model. Choose with --key or key='ema_model'.",
        f"{len(entries) + 2} entries are in no module of the network and were skipped: accuracy.correct, criterion.weight, "
        f"ema_model.* ({len(entries)}).",
    ]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    assert load(path, doubled, key="ema_model") == []


def test_two_prefixes_of_which_none_is_an_average(write, entries, variables):
    path = write({**prefixed("teacher.", entries, 2), **prefixed("student.", entries)})
    for call in (lambda: load_model(path), lambda: load_model(path, NAME), lambda: load_weights(path, variables)):
        with pytest.raises(
            ConversionError, match=r"several sets of weights, whose keys begin with .*--key student.*key='student'"
        ):
            call()
    assert load(path, variables, key="student") == []


def test_entries_beside_a_whole_network(write, entries, variables):
    path = write({**entries, "criterion.center": np.ones(3, np.float32), "labels": np.arange(3)})
    assert load(path, variables) == ["2 entries are in no module of the network and were skipped: criterion.center, labels."]


def test_a_head_of_another_name(write, entries, variables):
    path = write({f"net.{key.replace('fc.', 'cls.')}": value for key, value in entries.items()})
    _, notes = load_weights(path, variables)
    assert notes[1:] == [
        "2 entries are in no module of the network and were skipped: cls.* (2).",
        "The file has no head: fc, of 10 classes, keeps its initial values. If it is cls.weight, rename that to fc.weight.",
    ]
    assert len(load(path, variables, rename=[("cls", "fc")])) == 1


def test_entries_within_a_module_make_another_network(write, entries, variables):
    path = write({**entries, "layer1.0.se.weight": np.ones(3, np.float32)})
    with pytest.raises(ConversionError, match="No model here"):
        load_model(path)
    with pytest.raises(ConversionError, match=r"1 of its entries have no leaf:\n  layer1\.0\.se\.weight"):
        load_weights(path, variables)


def test_entries_beside_an_incomplete_network_are_differences(write, entries, variables):
    rest = {key: value for key, value in entries.items() if key != "layer1.0.bn3.weight"}
    with pytest.raises(ConversionError, match=r"have no leaf:\n  criterion\.weight .*\n1 entries are missing:\n  layer1\.0\.bn3"):
        load_weights(write({**rest, "criterion.weight": np.ones(3, np.float32)}), variables)


def test_renames_come_before_recognition(write, entries, variables):
    theirs = {f"my_{key}".replace("conv1_a", "conv_first"): value for key, value in entries.items()}
    path = write(theirs)
    assert open_checkpoint(path).convention.name == "own"
    renames = [("^my_", ""), ("conv_first", "conv1_a")]
    assert load(path, variables, rename=renames) == []
    checkpoint = open_checkpoint(path, rename=renames)
    assert checkpoint.convention.name == "reference"
    assert set(checkpoint.original) == set(theirs)
    assert set(checkpoint.named) == set(entries)


def test_what_is_ignored_below_a_prefix(write, entries, variables):
    path = write({**prefixed("model.", entries), "model.extra.weight": np.ones(3, np.float32)})
    start = jax.tree.map(np.zeros_like, variables)
    for pattern in ("model.fc.*", "fc.*"):
        found, _ = load_weights(path, start, ignore=[pattern])
        equal(found, {**variables, "params": {**variables["params"], "fc": start["params"]["fc"]}})


def test_one_pattern_in_place_of_a_sequence(write, entries, variables):
    with pytest.raises(ConversionError, match=r"ignore is a sequence of patterns: give \['fc\.\*'\]"):
        load_weights(write(entries), variables, ignore="fc.*")
