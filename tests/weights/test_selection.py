"""Which weights are taken from a checkpoint that holds several sets, or other things beside them."""

import numpy as np
import pytest
import safetensors.numpy

from scconv_jax import ConversionError, from_torch, weights
from scconv_jax.weights.files import WeightsError
from tests import weight_files as made
from tests.weight_files import dictionary, storage, tensor, text, whole

RAW = dictionary([("w", tensor())])
EMA = dictionary([("w", tensor()), ("b", tensor())])
MEANS = dictionary([("mean", tensor(shape=(2,), strides=(1,))), ("count", tensor(shape=(), strides=()))])
NUMBERS = dictionary([("0", text(1))])


def nested(*names, inner=RAW):
    for name in reversed(names):
        inner = dictionary([("epoch", text(3)), (name, inner)])
    return inner


def read(folder, opcodes, key=""):
    (folder / "x.pth").write_bytes(made.zip_file(whole(opcodes), [bytes(16), bytes(16)]))
    return weights.read(folder / "x.pth", key)


@pytest.mark.parametrize(
    "place",
    [
        "model_state", "best_state_dict", "net_state_dict", "backbone", "weights", "module", "params", "teacher",
        "ema_state_dict", "anything", "model.state_dict", "classy_state_dict.base_model.model.trunk",
    ],
)  # fmt: skip
def test_weights_that_are_alone_are_taken_whatever_their_name(tmp_path, place):
    source = read(tmp_path, nested(*place.split(".")))
    assert (list(source.tensors), source.key, source.others) == (["w"], place, ())
    assert source.skipped == {"epoch": "int"}


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("state_dict", "state_dict_ema"), ("state_dict", "ema_state_dict"), ("model", "model_ema"), ("params", "params_ema"),
        ("model", "ema"), ("net", "swa_model"), ("model_state", "averaged_model"), ("state_dict", "ema.module"), ("net", "EMA"),
        ("model", "ema.shadow"),
    ],
)  # fmt: skip
def test_of_several_the_average_is_taken_and_the_others_are_named(tmp_path, raw, average):
    name, *inner = average.split(".")
    both = [(raw, RAW), (name, nested(*inner, inner=EMA)), ("optimizer", NUMBERS)]
    for entries in (both, both[::-1]):
        source = read(tmp_path, dictionary(entries))
        assert (list(source.tensors), source.key, source.others) == (["w", "b"], average, (raw,))
        assert source.skipped[raw] == "dict"
        chosen = read(tmp_path, dictionary(entries), raw)
        assert (list(chosen.tensors), chosen.key) == (["w"], raw)


@pytest.mark.parametrize(
    "names", [("teacher", "student"), ("state_dict", "best_state_dict"), ("a_ema", "b_ema", "a"), ("encoder", "decoder")]
)
def test_otherwise_the_user_chooses(tmp_path, names):
    opcodes = dictionary([("epoch", text(3)), *((name, dictionary([("w", tensor()), (name, tensor())])) for name in names)])
    with pytest.raises(
        WeightsError, match=rf"it holds several sets of weights: {', '.join(names)}\. Choose one by its key: --key"
    ):
        read(tmp_path, opcodes)
    for name in names:
        source = read(tmp_path, opcodes, name)
        assert (list(source.tensors), source.key) == (["w", name], name)


def test_one_set_under_two_names_is_one(tmp_path):
    source = read(tmp_path, b"}(" + text("state_dict") + RAW + b"q\x07" + text("model") + b"h\x07u")
    assert (source.key, source.others) == ("state_dict", ())


def test_weights_at_the_top_beside_a_copy(tmp_path):
    entries = [("w", tensor()), ("v", tensor()), ("ema", EMA)]
    source = read(tmp_path, dictionary(entries))
    assert (source.key, source.others) == ("ema", (".",))
    assert list(read(tmp_path, dictionary(entries), ".").tensors) == ["w", "v"]
    with pytest.raises(WeightsError, match=r"several sets of weights: \. \(the top level\), copy\. Choose"):
        read(tmp_path, dictionary([*entries[:2], ("copy", EMA)]))


@pytest.mark.parametrize(
    "items",
    [
        {"normalizer": MEANS}, {"rng": dictionary([("torch", tensor(storage("1", "torch.ByteStorage"), 0, (4,), (1,)))])},
        {"best_acc": tensor(shape=(), strides=())}, {"confusion": tensor()}, {"optimizer": dictionary([("exp_avg", RAW)])},
        {"criterion": RAW}, {"loss_fn": MEANS}, {"callbacks": dictionary([("best", RAW)])}, {"metrics": MEANS},
        {"lists": b"](" + RAW + b"e"},
    ],
    ids=lambda items: next(iter(items)),
)  # fmt: skip
def test_other_tensors_are_no_second_set_of_weights(tmp_path, items):
    for entries in ([("model", EMA), *items.items()], [*items.items(), ("model", EMA)]):
        source = read(tmp_path, dictionary(entries))
        assert (source.key, source.others, list(source.skipped)) == ("model", (), list(items))


def test_vectors_are_weights_if_there_is_nothing_better(tmp_path):
    assert read(tmp_path, nested("state_dict", inner=MEANS)).key == "state_dict"


def test_a_key_that_is_not_there(tmp_path):
    opcodes = dictionary([("model", RAW), ("model_ema", EMA)])
    with pytest.raises(WeightsError, match=r"key 'model_emma'\. Did you mean 'model_ema'\? Its keys: model, model_ema, w, b\."):
        read(tmp_path, opcodes, "model_emma")


def test_a_key_may_be_a_prefix(tmp_path):
    names = ["model.w", "ema_model.w", "ema_model.fc.b", "criterion.w"]
    numbers = {name: np.full((2, 2), i, np.float32) for i, name in enumerate(names)}
    safetensors.numpy.save_file(numbers, tmp_path / "x.safetensors")
    source = weights.read(tmp_path / "x.safetensors", "ema_model")
    assert set(source.tensors) == {"w", "fc.b"}
    np.testing.assert_array_equal(source.tensors["w"], 1)
    assert source.skipped == dict.fromkeys(("model.w", "criterion.w"), "an array")
    source = read(tmp_path, dictionary([("state_dict", dictionary([(name, tensor()) for name in names]))]), "state_dict.model")
    assert list(source.tensors) == ["w"]
    with pytest.raises(WeightsError, match=r"no weights under the key 'ema'\. Did you mean 'ema_model'\? Its keys: "):
        weights.read(tmp_path / "x.safetensors", "ema")


def test_a_state_dict_in_memory():
    layer, template = {"fc.weight": np.ones((2, 3))}, {"params": {"fc": {"kernel": np.zeros((3, 2))}}}
    twice = {"fc.weight": 2 * layer["fc.weight"]}
    found = from_torch({"model": layer, "model_ema": twice, "epoch": 3}, template)
    np.testing.assert_array_equal(found["params"]["fc"]["kernel"], 2)
    with pytest.raises(ConversionError, match=r"The state dict cannot be used: it holds several sets of weights: g, d\."):
        from_torch({"g": layer, "d": twice}, template)
