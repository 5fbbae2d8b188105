"""Folders of the Hugging Face hub, and models in several files."""

import json

import numpy as np
import pytest
import safetensors.numpy

from scconv_jax import weights
from scconv_jax.weights import torch_files
from scconv_jax.weights.files import WeightsError

ARRAYS = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(2, np.float32), "b.weight": np.full((2, 2), 2, np.float32)}
PARTS = {"model-00001-of-00002.safetensors": ["a.weight", "a.bias"], "model-00002-of-00002.safetensors": ["b.weight"]}
INDEX = "model.safetensors.index.json"


def write(path, keys=tuple(ARRAYS)):
    arrays = {key: ARRAYS[key] for key in keys}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        torch_files.write_zip(path, arrays)


def write_index(folder, index=INDEX, parts=PARTS):
    names = {key: name for name, keys in parts.items() for key in keys}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": names}))


@pytest.fixture
def sharded(tmp_path):
    for name, keys in PARTS.items():
        write(tmp_path / name, keys)
    write_index(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def assert_whole(source):
    assert set(source.tensors) == set(ARRAYS)
    for key, value in ARRAYS.items():
        np.testing.assert_array_equal(source.tensors[key], value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "last.ckpt"])
def test_a_folder_with_one_file_of_weights(tmp_path, name):
    write(tmp_path / name)
    for other in ("config.json", "README.md", "tf_model.h5"):
        (tmp_path / other).write_text("{}")
    source = weights.read(tmp_path)
    assert_whole(source)
    assert source.path == tmp_path / name


def test_of_two_formats_of_the_hub_the_safer_is_taken(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        write(tmp_path / name)
    assert weights.read(tmp_path).path.name == "model.safetensors"


def test_several_files_that_might_be_meant(tmp_path):
    for name in ("best.pth", "last.pth"):
        write(tmp_path / name)
    with pytest.raises(WeightsError, match=r"it has several files of weights: best\.pth, last\.pth\. Give one of them\.$"):
        weights.read(tmp_path)


def test_all_shards_of_an_index(sharded):
    for path in (sharded, sharded / INDEX):
        source = weights.read(path)
        assert_whole(source)
        assert source.format == "safetensors in 2 shards"
        assert source.bytes == sum((sharded / name).stat().st_size for name in PARTS)


def test_shards_of_pytorch(tmp_path):
    parts = {f"pytorch_model-0000{i}-of-00003.bin": [key] for i, key in enumerate(ARRAYS, 1)}
    for name, keys in parts.items():
        write(tmp_path / name, keys)
    write_index(tmp_path, "pytorch_model.bin.index.json", parts)
    source = weights.read(tmp_path)
    assert_whole(source)
    assert source.format == "torch zip in 3 shards"


def test_a_shard_alone(sharded):
    with pytest.raises(WeightsError, match=r"it is shard 1 of 2 of a model\. Give the index, model\.safetensors\.index\.json\.$"):
        weights.read(sharded / "model-00001-of-00002.safetensors")
    (sharded / INDEX).unlink()
    with pytest.raises(
        WeightsError, match=r"shards of a model, such as .*, but not their index; download model\.safetensors\.index"
    ):
        weights.read(sharded)


def test_the_only_shard_is_the_whole_model(tmp_path):
    write(tmp_path / "model-00001-of-00001.safetensors")
    assert_whole(weights.read(tmp_path / "model-00001-of-00001.safetensors"))


def test_a_shard_that_is_absent_or_another(sharded):
    second = sharded / "model-00002-of-00002.safetensors"
    write(second, ["b.weight", "a.bias"])
    with pytest.raises(
        WeightsError, match=r"shard model-00002-of-00002\.safetensors does not hold what it says: a\.bias is in one"
    ):
        weights.read(sharded)
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(
        WeightsError, match=r"its shard model-00002-of-00002\.safetensors is bad: it is a damaged safetensors file"
    ):
        weights.read(sharded)
    second.unlink()
    with pytest.raises(
        WeightsError, match=r"1 of its 2 shards are not in the folder: model-00002-of-00002\.safetensors\. Download"
    ):
        weights.read(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", ".", 3, None, ["x"]])
def test_an_index_that_leads_elsewhere(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match=r"not a file in its folder|no index of a model|not in the folder"):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": 3}', b"[" * 10**5, b"\xff", b"{}" * 9]
)
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(WeightsError, match=r"it is no index of a model: {\"weight_map\": {KEY: FILE, \.\.\.}} is expected"):
        weights.read(tmp_path / INDEX)


def test_an_index_of_nothing(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(WeightsError, match="it holds no arrays"):
        weights.read(tmp_path)
