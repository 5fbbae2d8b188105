"""The converter alone, on state dicts of NumPy arrays: nothing is lost, nothing is guessed."""

import ast
import re
import shlex
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scconv_jax import ConversionError, SelfCalibratedConv, create_model, from_torch, to_torch
from scconv_jax.interop.conversion import convert

X = jnp.zeros((1, 8, 8, 8))


@pytest.fixture
def variables():
    """A layer's variables with a value of its own in every element."""
    shapes = jax.eval_shape(partial(SelfCalibratedConv(8).init, train=False), jax.random.key(0), X)
    leaves, tree = jax.tree.flatten(shapes)
    numbers = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [numbers.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture
def state_dict(variables):
    return to_torch(variables)


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_over_and_back(variables, state_dict):
    assert_same(from_torch(state_dict, variables), variables)
    shapes = jax.eval_shape(lambda: variables)
    assert_same(from_torch(state_dict, shapes), variables)


@pytest.mark.parametrize("name", ["scnet50_v1d", "se_scnet50", "scnext50", "scnet20_small"])
def test_names_of_a_network_are_one_to_one(name):
    model = create_model(name)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 97, 97, 3)))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    found = to_torch(variables)
    counted = [key for key in found if not key.endswith("num_batches_tracked")]
    assert len(counted) == len(jax.tree.leaves(variables))


def test_layout(variables, state_dict):
    """(h, w, in, out) here, (out, in, h, w) there; a BatchNorm's five entries from our four."""
    kernel = variables["params"]["k1"]["0"]["kernel"]
    np.testing.assert_array_equal(state_dict["k1.0.weight"], np.einsum("hwio->oihw", kernel))
    norm = {key.rpartition(".")[2]: value for key, value in state_dict.items() if key.startswith("scconv.k2.2.")}
    assert set(norm) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    ours = {kind: variables[kind]["scconv"]["k2"]["2"] for kind in ("params", "batch_stats")}
    np.testing.assert_array_equal(norm["weight"], ours["params"]["scale"])
    np.testing.assert_array_equal(norm["bias"], ours["params"]["bias"])
    np.testing.assert_array_equal(norm["running_mean"], ours["batch_stats"]["mean"])
    np.testing.assert_array_equal(norm["running_var"], ours["batch_stats"]["var"])
    assert norm["num_batches_tracked"].dtype == np.int64


def test_arrays_are_fit_for_writing_to_files_and_for_torch(variables):
    """Contiguous, or safetensors writes another order; writable, or torch warns."""
    for given in (variables, jax.tree.map(jnp.asarray, variables)):
        for name, value in to_torch(given).items():
            assert value.flags.c_contiguous, name
            assert value.flags.writeable, name


def test_results_are_copies(variables, state_dict):
    loaded = from_torch(state_dict, variables)
    for value in state_dict.values():
        value[...] = 7
    for leaf in jax.tree.leaves(variables):
        assert not (leaf == 7).any()
    for leaf in jax.tree.leaves(loaded):
        assert not (leaf == 7).any()


def test_every_difference_is_listed_at_once(variables, state_dict):
    del state_dict["k1.0.weight"]
    state_dict["k1.0.wieght"] = np.zeros((4, 4, 3, 3), np.float32)
    state_dict["scconv.k4.1.running_var"] = np.zeros(5, np.float32)
    with pytest.raises(ConversionError) as error:
        from_torch(state_dict, variables)
    message = str(error.value)
    assert "k1.0.wieght (4, 4, 3, 3) (nearest: k1.0.weight)" in message
    assert "1 entries are missing, 1 of them named above.\n" in message, "each difference is listed once"
    assert message.count("k1.0.weight") == 1
    assert "scconv.k4.1.running_var: (5,) in the state dict, (4,) expected" in message


def test_thousands_of_differences_take_no_minutes(variables):
    strangers = {f"layer1.{i}.conv1.weight": np.zeros(()) for i in range(5000)} | {f"x{i}": np.zeros(()) for i in range(500)}
    start = time.process_time()
    with pytest.raises(ConversionError, match=r"5500 of its entries have no leaf:(?s:.*) and 4500 more\n") as error:
        from_torch(strangers, variables)
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 100_000


def test_equal_sizes_are_not_equal_shapes(variables, state_dict):
    """A kernel with its axes in another order has as many elements, and is refused."""
    state_dict["k1.0.weight"] = state_dict["k1.0.weight"].transpose(2, 3, 1, 0)
    with pytest.raises(ConversionError, match=r"k1\.0\.weight: \(3, 3, 4, 4\) in the state dict, \(4, 4, 3, 3\) expected"):
        from_torch(state_dict, variables)


def test_rename(variables, state_dict):
    other = {key.replace("scconv.", "branch.").replace("k1.", "plain."): value for key, value in state_dict.items()}
    assert_same(from_torch(other, variables, rename=[(r"^branch\.", "scconv."), (r"^plain\.", "k1.")]), variables)
    with pytest.raises(ConversionError, match=r"Two entries.*k1\.1\.weight"):
        from_torch(state_dict, variables, rename=[(r"^scconv\.k3", "k1")])


def test_ignore_and_not_strict(variables, state_dict):
    template = jax.tree.map(np.zeros_like, variables)
    state_dict["extra.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError, match=r"extra\.weight"):
        from_torch(state_dict, template)
    assert_same(from_torch(state_dict, template, ignore=["extra.*"]), variables)
    del state_dict["k1.1.bias"]
    loaded = from_torch(state_dict, template, strict=False)
    np.testing.assert_array_equal(loaded["params"]["k1"]["1"]["bias"], 0)
    np.testing.assert_array_equal(loaded["params"]["k1"]["0"]["kernel"], variables["params"]["k1"]["0"]["kernel"])
    with pytest.raises(ConversionError, match=r"k1\.1\.bias.*only shapes"):
        from_torch(state_dict, jax.eval_shape(lambda: template), strict=False)


def test_a_whole_checkpoint_in_place_of_its_state_dict(variables):
    with pytest.raises(ConversionError, match=r"epoch.*int"):
        from_torch({"epoch": 3, "model": {}}, variables)


def test_one_pattern_in_place_of_a_sequence_does_not_ignore_everything(variables, state_dict):
    with pytest.raises(ConversionError, match=r"ignore is a sequence of patterns: give \['scconv\.\*'\]"):
        from_torch(state_dict, variables, ignore="scconv.*")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rename", "message"),
    [(("a", "b"), "'a': not enough"), ([("(", "")], "unterminated"), ([("k", r"\9")], "invalid group"), ([("k", 3)], "k', 3")],
)
def test_invalid_renames(variables, state_dict, rename, message):
    with pytest.raises(ConversionError, match=f"rename is a sequence of pairs.*{message}"):
        from_torch(state_dict, variables, rename=rename)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("scnet50.pth", "maps keys to arrays; got str. .*load_model"),
        (None, "got NoneType"),
        ({0: np.zeros(3)}, "are strings; one of them is 0"),
    ],
)
def test_values_that_are_not_state_dicts(variables, given, message):
    with pytest.raises(ConversionError, match=message):
        from_torch(given, variables)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [SelfCalibratedConv(8), None, [1]])
def test_values_that_are_not_variables(state_dict, given):
    with pytest.raises(ConversionError, match=rf"Variables are .*; got {type(given).__name__}"):
        to_torch(given)
    with pytest.raises(ConversionError, match=rf"Variables are .*; got {type(given).__name__}"):
        from_torch(state_dict, given)


def test_variables_without_the_name_of_their_collection(variables, state_dict):
    with pytest.raises(ConversionError, match="Variables are"):
        from_torch(state_dict, variables["params"])


@pytest.mark.parametrize("outer", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(variables, state_dict, outer):
    """DataParallel, torch.compile, both; and AveragedModel, which counts beside them."""
    wrapped = {f"{outer}{key}": value for key, value in state_dict.items()}
    assert_same(from_torch(wrapped, variables), variables)
    assert_same(from_torch({"n_averaged": np.array(5), **wrapped}, variables), variables)


def test_a_leaf_of_no_known_kind():
    with pytest.raises(ConversionError, match=r"params/layer/wait"):
        to_torch({"params": {"layer": {"wait": np.zeros(3)}}})


@pytest.mark.parametrize(("old", "new"), [("^", "net."), (r"^k1\.", "first."), ("scconv", "branch"), (r"\bk", "conv")])
def test_one_rename_that_would_mend_all_differences_is_proposed(variables, state_dict, old, new):
    """And it does: for a prefix, another name at the beginning or in the middle of keys."""
    renamed = {re.sub(old, new, key): value for key, value in state_dict.items()}
    with pytest.raises(ConversionError, match="All keys differ alike: rename=") as error:
        from_torch(renamed, variables)
    rule = re.search(r"rename=\[(\(.*\))\], or --rename (.*), would mend it\.", str(error.value))
    assert rule is not None
    pair = ast.literal_eval(rule[1])
    assert shlex.split(rule[2]) == list(pair)
    assert_same(from_torch(renamed, variables, rename=[pair]), variables)


def test_no_rename_is_proposed_that_does_not_mend_all(variables, state_dict):
    renamed = {f"net.{key}": value for key, value in state_dict.items()}
    renamed["net.k1.1.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ConversionError) as error:
        from_torch(renamed, variables)
    assert "differ alike" not in str(error.value)


def test_to_torch_renames(variables):
    named = to_torch(variables, rename=[("^", "net."), ("scconv", "branch")])
    assert named.keys() == {f"net.{key.replace('scconv', 'branch')}" for key in to_torch(variables)}
    assert_same(from_torch(named, variables, rename=[(r"^net\.", ""), ("branch", "scconv")]), variables)
    with pytest.raises(ConversionError, match="Two entries have the key x after renaming"):
        to_torch(variables, rename=[("^.*$", "x")])


def test_advice_names_only_options_that_exist(variables):
    with pytest.raises(ConversionError) as error:
        convert({}, variables)
    assert "strict" not in str(error.value)
    with pytest.raises(ConversionError, match=r"\(ignore\), or skip all \(strict=False\)\."):
        from_torch({}, variables)
