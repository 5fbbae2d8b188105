"""Writing and reading weights without PyTorch: nothing is lost, nothing is half written, other files are recognised."""

import io
import json
import os
import re
import resource
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import scconv_jax
from scconv_jax import weights
from scconv_jax.weights import files, safetensors_files, torch_files
from scconv_jax.weights.files import WeightsError
from tests import weight_files as made
from tests.weight_files import call, dictionary, named, storage, tensor, text, whole


@pytest.fixture
def variables():
    """A tree of several dtypes, in part with arrays that are not contiguous."""
    numbers = np.random.default_rng(0)
    kernel = numbers.standard_normal((3, 3, 4, 8)).astype(np.float32)
    return {
        "params": {
            "conv1": {"kernel": kernel.transpose(1, 0, 2, 3), "bias": jnp.arange(8.0)},
            "layer1": {"0": {"bn": {"scale": kernel[0, 0, 0, ::2], "bias": np.ones(4, ml_dtypes.bfloat16)}}},
            "fc": {"kernel": numbers.standard_normal((8, 2)).T.T.astype(np.float16)},
        },
        "batch_stats": {"layer1": {"0": {"bn": {"mean": numbers.standard_normal(4), "var": np.ones(4)}}}},
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(ours) is np.ndarray
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == np.asarray(theirs).tobytes()


def test_over_and_back(tmp_path, variables):
    path = tmp_path / "x.safetensors"
    metadata = {"model": "scnet50", "arguments": {"num_classes": 2, "output_stride": 8}, "source": "a.pth", "version": "0.1.0"}
    scconv_jax.save(path, variables, metadata)
    loaded = scconv_jax.load(path)
    assert_same(loaded.variables, variables)
    assert loaded.metadata == metadata
    again, said = loaded
    assert again is loaded.variables
    assert said is loaded.metadata
    source = weights.read(path)
    assert (source.format, source.is_flax, source.bytes) == ("safetensors", True, path.stat().st_size)
    assert json.loads(source.metadata["arguments"]) == metadata["arguments"]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_loaded_arrays_can_be_changed(tmp_path, variables):
    path = tmp_path / "x.safetensors"
    scconv_jax.save(path, variables)
    loaded = scconv_jax.load(path).variables
    path.write_bytes(b"")
    for leaf in jax.tree.leaves(loaded):
        leaf[...] = 0


def test_other_readers_of_safetensors_find_the_paths(tmp_path, variables):
    path = tmp_path / "x.safetensors"
    del variables["params"]["layer1"]["0"]["bn"]["bias"]  # NumPy alone has no bfloat16
    scconv_jax.save(path, variables)
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["params/conv1/kernel"], variables["params"]["conv1"]["kernel"])
    np.testing.assert_array_equal(found["batch_stats/layer1/0/bn/mean"], variables["batch_stats"]["layer1"]["0"]["bn"]["mean"])


def test_the_bytes_are_those_that_the_library_writes(tmp_path):
    arrays = {"params/β": np.arange(6.0).reshape(2, 3), "params/a": np.ones(3, np.float16), "params/c": np.array(True)}
    arrays |= {"params/b": np.arange(4, dtype=np.float32), "params/e": np.zeros((0, 2), np.int64)}
    for metadata in ({"model": 'a "quoted" ö'}, {}):
        safetensors_files.write(tmp_path / "x", arrays, metadata)
        assert (tmp_path / "x").read_bytes() == safetensors.numpy.save(arrays, metadata or None)


def test_a_network_in_two_lines(tmp_path):
    path = tmp_path / "x.safetensors"
    model = scconv_jax.create_model("scnet20_small", num_classes=3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    scconv_jax.save(path, variables, {"model": "scnet20_small", "arguments": {"num_classes": 3}})
    loaded, metadata = scconv_jax.load(path)
    again = scconv_jax.create_model(metadata["model"], **metadata["arguments"])
    assert again == model
    assert_same(loaded, variables)


@pytest.mark.parametrize("suffix", ["pth", "pt"])
def test_as_pytorch_and_back(tmp_path, variables, suffix):
    path = tmp_path / f"x.{suffix}"
    scconv_jax.save(path, variables)
    source = weights.read(path)
    assert (source.format, source.is_flax) == ("torch zip", False)
    expected = scconv_jax.to_torch(variables)
    assert_same(source.tensors, expected)
    assert list(source.tensors) == list(expected)
    assert_same(scconv_jax.from_torch(source.tensors, variables), variables)


def test_the_same_weights_are_the_same_file(tmp_path, variables):
    for suffix in ("pth", "safetensors"):
        for name in ("a", "b"):
            scconv_jax.save(tmp_path / f"{name}.{suffix}", variables)
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_load_takes_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=re.escape("load_model('scnet50') downloads published weights.")):
        scconv_jax.load("scnet50")


def test_pytorchs_names_are_not_loaded_as_variables(tmp_path, variables):
    path = tmp_path / "x.pth"
    scconv_jax.save(path, variables)
    with pytest.raises(WeightsError, match=r"has PyTorch's keys.*python -m scconv_jax convert"):
        scconv_jax.load(path)


@pytest.mark.parametrize(
    "arguments",
    [
        *("{", "[" * 100_000, "[1]", "3", "null", '{"a": {}}', '{"a": [[1]]}', f'{{"a": [{"1," * 64}1]}}'),
        *('{"a": "\\u001b[2J"}', '{"\x9b": 1}', '{"a": ["\\u001b[2J"]}'),
    ],
)
def test_arguments_that_are_no_options(tmp_path, variables, arguments):
    scconv_jax.save(tmp_path / "x.safetensors", variables, {"arguments": arguments})
    with pytest.raises(WeightsError, match="the arguments in its metadata are not a JSON object"):
        weights.read(tmp_path / "x.safetensors")


# Both formats of PyTorch, from hand-made files


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_state_dicts(tmp_path, kind):
    path = tmp_path / "x.pth"
    expected = made.arrays()
    path.write_bytes(made.state_dict_file(kind, expected))
    source = weights.read(path)
    assert_same(source.tensors, expected)
    assert (source.format, source.is_flax, source.skipped, source.not_finite) == (f"torch {kind}", False, {}, {})


FORMATS = {"zip": made.zip_file, "legacy": made.legacy_file}


def read_entry(path, form, opcodes, numbers):
    storage_bytes = np.asarray(numbers).tobytes()
    content = whole(dictionary([("w", opcodes)]))
    path.write_bytes(
        made.zip_file(content, [storage_bytes]) if form == "zip" else made.legacy_file(content, [storage_bytes], [len(numbers)])
    )
    return weights.read(path).tensors["w"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (0, (3, 4), (4, 1), np.arange(12).reshape(3, 4)),
        (0, (4, 3), (1, 4), np.arange(12).reshape(3, 4).T),
        (5, (2, 2), (4, 2), [[5, 7], [9, 11]]),
        (2, (), (), 2),
        (11, (1,), (99,), [11]),
        (3, (2, 3), (0, 1), [[3, 4, 5]] * 2),
        (12, (0,), (1,), []),
        (0, (2, 0, 3), (0, 3, 1), np.zeros((2, 0, 3))),
    ],
    ids=["whole", "transposed", "a part", "one number", "the last", "repeated", "none", "no rows"],
)
def test_views_of_a_storage(tmp_path, form, offset, shape, strides, expected):
    opcodes = tensor(storage(count=12), offset, shape, strides)
    found = read_entry(tmp_path / "x.pth", form, opcodes, np.arange(12, dtype=np.float32))
    assert found.dtype == np.float32
    assert found.shape == shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("Double", np.array([1.5, -2])), ("Half", np.array([1.5, -2], np.float16)),
        ("BFloat16", np.array([1.5, -2], ml_dtypes.bfloat16)), ("Long", np.array([2**60, -1])),
        ("Int", np.array([7, -1], np.int32)), ("Short", np.array([7, -1], np.int16)), ("Char", np.array([7, -1], np.int8)),
        ("Byte", np.array([7, 255], np.uint8)), ("Bool", np.array([True, False])),
    ],
)  # fmt: skip
def test_dtypes(tmp_path, form, kind, numbers):
    found = read_entry(tmp_path / "x.pth", form, tensor(storage(kind=f"torch.{kind}Storage", count=2), 0, (2,), (1,)), numbers)
    assert found.dtype == numbers.dtype
    np.testing.assert_array_equal(found, numbers)


def test_numbers_of_a_big_endian_machine(tmp_path):
    opcodes = whole(dictionary([("w", tensor()), ("b", tensor(storage("1", "torch.BFloat16Storage", 2), 0, (2,), (1,)))]))
    floats, halves = np.arange(4, dtype=np.float32), np.array([1.5, -2], ml_dtypes.bfloat16)
    entries = [
        made.Entry("archive/data.pkl", opcodes), made.Entry("archive/byteorder", b"big"),
        made.Entry("archive/data/0", floats.byteswap().tobytes()), made.Entry("archive/data/1", halves.byteswap().tobytes()),
    ]  # fmt: skip
    (tmp_path / "x.pth").write_bytes(made.archive(entries))
    found = weights.read(tmp_path / "x.pth").tensors
    np.testing.assert_array_equal(found["w"].ravel(), floats)
    np.testing.assert_array_equal(found["b"], halves)
    machine = made.MACHINE.replace(b"\x88", b"\x89")
    (tmp_path / "x.pth").write_bytes(made.legacy_file(whole(dictionary([("w", tensor())])), machine=machine))
    with pytest.raises(WeightsError, match="big-endian"):
        weights.read(tmp_path / "x.pth")


def test_an_archive_without_checksums(tmp_path):
    """As PyTorch writes with `torch.serialization.set_crc32_options(False)`."""
    entries = [made.Entry("x/data.pkl", whole(dictionary([("w", tensor())])), crc=0), made.Entry("x/data/0", bytes(16), crc=0)]
    (tmp_path / "x.pth").write_bytes(made.archive(entries))
    assert list(weights.read(tmp_path / "x.pth").tensors) == ["w"]


WEIGHTS = dictionary([("w", tensor())])
SCRIPT = {
    "epoch": text(90),
    "arch": text("resnet50"),
    "state_dict": WEIGHTS,
    "best_acc1": tensor(),
    "optimizer": dictionary([("state", b"}"), ("param_groups", b"]")]),
    "lr": text(0.1),
    "loss": text([1.5, None]),
}
KINDS = {"epoch": "int", "arch": "str", "best_acc1": "a tensor", "optimizer": "dict", "lr": "float", "loss": "list"}
NAMESPACE = named("argparse.Namespace") + b")\x81}" + text("lr") + text(0.1) + b"sb"
SCALAR = call("numpy.core.multiarray.scalar", call("numpy.dtype", "f8", False, True), "x")
REBUILD = named("torch._utils._rebuild_tensor_v2")
ATTRIBUTES = call("torch._tensor._rebuild_from_type_v2", REBUILD, named("torch.Tensor"), tensor()[len(REBUILD) : -1], b"}")
CHECKPOINTS = {
    "wrapped": (dictionary([("state_dict", WEIGHTS)]), {}),
    "wrapped twice": (dictionary([("model", dictionary([("state_dict", WEIGHTS), ("x", b"N")]))]), {"x": "NoneType"}),
    "a number beside": (dictionary([("w", tensor()), ("epoch", text(3))]), {"epoch": "int"}),
    "ImageNet script": (dictionary(SCRIPT.items()), KINDS),
    "Namespace": (dictionary([("args", NAMESPACE), ("state_dict", WEIGHTS)]), {"args": "argparse.Namespace"}),
    "NumPy scalar": (dictionary([("best", SCALAR), ("net", WEIGHTS)]), {"best": "numpy.core.multiarray.scalar"}),
    "Python 2": (call("collections.OrderedDict", b"](](" + text("w") + tensor() + b"ee"), {}),
    "metadata": (call("collections.OrderedDict") + text("w") + tensor() + b"s" + dictionary([("_metadata", b"}")]) + b"b", {}),
    "Parameter": (dictionary([("w", call("torch._utils._rebuild_parameter", tensor(), True, b"}"))]), {}),
    "tensor with attributes": (dictionary([("w", ATTRIBUTES)]), {}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_forms_of_checkpoints(tmp_path, form, name):
    opcodes, skipped = CHECKPOINTS[name]
    (tmp_path / "x.pth").write_bytes(FORMATS[form](whole(opcodes), [np.arange(4, dtype=np.float32).tobytes()]))
    source = weights.read(tmp_path / "x.pth")
    assert list(source.tensors) == ["w"]
    np.testing.assert_array_equal(source.tensors["w"], [[0, 1], [2, 3]])
    assert source.skipped == skipped


def test_values_that_are_not_finite_are_counted(tmp_path, caplog):
    numbers = {"a": np.array([1, np.nan, np.inf], np.float32), "b": np.array([-np.inf], ml_dtypes.bfloat16), "c": np.ones(3)}
    torch_files.write_zip(tmp_path / "x.pth", numbers)
    assert weights.read(tmp_path / "x.pth").not_finite == {"a": 2, "b": 1}
    scconv_jax.save(tmp_path / "x.safetensors", {"params": numbers})
    assert weights.read(tmp_path / "x.safetensors").not_finite == {"params/a": 2, "params/b": 1}
    assert np.isnan(scconv_jax.load(tmp_path / "x.safetensors").variables["params"]["a"][1])
    assert "x.safetensors: 3 values are NaN or infinite, in params/" in caplog.text


# Writing


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    """A limit on the length of files stands for a full disk."""
    path = tmp_path / name
    scconv_jax.save(path, {"params": {"fc": {"bias": np.zeros(3)}}})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(WeightsError, match=rf"Cannot write .*{name}: .*[Ff]ile too large"):
            scconv_jax.save(path, {"params": {"fc": {"bias": np.zeros(100_000)}}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_an_interruption_leaves_nothing(tmp_path, name, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scconv_jax.save(tmp_path / name, {"params": {"fc": {"bias": np.zeros(3)}}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="where files must have a name, a killed process leaves it")
def test_a_killed_process_leaves_nothing(tmp_path):
    code = """
import sys, time
from scconv_jax.weights.files import replacing
with replacing(sys.argv[1]) as path:
    path.write_bytes(bytes(1000))
    print("half", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "x.pth"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("x.npz", r"must end in \.safetensors, \.pth or \.pt"),
        ("nowhere/x.pth", "There is no folder"),
        ("folder.pth", "is a folder"),
        ("x" * 300 + ".pth", "File name too long"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, name, match):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError, match=match):
        scconv_jax.save(tmp_path / name, {"params": {"fc": {"bias": np.zeros(3)}}})
    assert [found.name for found in tmp_path.iterdir()] == ["folder.pth"]


@pytest.mark.parametrize("variables", [{}, {"fc": {"bias": np.zeros(3)}}, {"params": {}, "opt_state": {}}])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_only_variables_are_written(tmp_path, name, variables):
    with pytest.raises(WeightsError, match=r"variables are .*; got (none|fc|params, opt_state)"):
        scconv_jax.save(tmp_path / name, variables)
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_is_no_json_is_not_written(tmp_path, variables):
    with pytest.raises(WeightsError, match=r"metadata must be strings or values that JSON can express \(Object of type float32"):
        scconv_jax.save(tmp_path / "x.safetensors", variables, {"top1": np.float32(0.9)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_must_not_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(WeightsError, match=r"Cannot write .*x\.pth: Permission denied"):
        scconv_jax.save(tmp_path / "x.pth", {"params": {"fc": {"bias": np.zeros(3)}}})


@pytest.mark.parametrize("nameless", [True, False], ids=["without a name", "with one"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_where_files_need_a_name_and_where_not(tmp_path, name, nameless, monkeypatch):
    if not nameless:
        monkeypatch.setattr("scconv_jax.files._open_unnamed", lambda _: None)
    elif scconv_jax.files._open_unnamed(tmp_path) is None:
        pytest.skip("this file system has no files without names")
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda _: seen.extend(path.name for path in tmp_path.iterdir()))
    for number in (1, 2):
        scconv_jax.save(tmp_path / name, {"params": {"fc": {"bias": np.full(3, number)}}})
    assert len(seen) == (1 if nameless else 3), "before it is whole, nothing is to be seen"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert weights.read(tmp_path / name)


def test_dtypes_that_the_formats_lack(tmp_path):
    with pytest.raises(WeightsError, match=r"w has dtype complex64"):
        torch_files.write_zip(tmp_path / "x.pth", {"w": np.zeros(3, np.complex64)})
    with pytest.raises(WeightsError, match=r"Cannot write"):
        scconv_jax.save(tmp_path / "x.safetensors", {"params": {"w": np.array(["text"])}})
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_usual_rights(tmp_path):
    scconv_jax.save(tmp_path / "x.safetensors", {"params": {"w": np.zeros(3)}})
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode


# Other files


def archive_of(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "/").replace("_DOT_", "."), content)
    return buffer.getvalue()


OTHERS = {
    "empty": (b"", "it is empty"),
    "zeros": (bytes(5000), "nothing but zeros"),
    "HTML": (b"\n<!DOCTYPE html><html>404", "a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>NoSuchKey", "a web page"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 file, as Keras"),
    "Keras 3": (archive_of(config_DOT_json="{}", metadata_DOT_json="{}"), "a Keras model"),
    "ONNX": (b"\x08\x07\x12\x07pytorch", "protocol buffer, perhaps of ONNX"),
    "npy": (b"\x93NUMPY\1\0", "a single NumPy array"),
    "npz": (archive_of(w_DOT_npy="x"), "archive of NumPy arrays"),
    "gzip": (b"\x1f\x8b\x08", "compressed with gzip"),
    "tar": (b"pickle".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "pointer of Git LFS"),
    "JSON": (b'{"weight_map": {}}', "a JSON file"),
    "pickle": (made.whole(text({"w": 1})), "a Python pickle"),
    "text": (b"layer1 0.5 0.7", "in an unknown format"),
    "zip": (archive_of(readme="x"), "a zip archive, but not of PyTorch"),
    "TorchScript": (archive_of(m__data_DOT_pkl="x", m__constants_DOT_pkl="x", m__code__x_DOT_py="x"), "TorchScript archive"),
    "a model": (made.zip_file(whole(named("torchvision.models.resnet.ResNet") + b")\x81}b")), "a whole pickled model"),
    "a list": (made.zip_file(whole(b"]" + tensor() + b"a")), "it holds list, not a state dict"),
    "a tensor": (made.zip_file(whole(tensor())), "it holds a tensor, not a state dict"),
    "two networks": (made.zip_file(whole(dictionary([("G", WEIGHTS), ("D", dictionary([("w", tensor())]))]))), "G, D. Choose"),
    "no weights": (made.zip_file(whole(dictionary([]))), "but nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_recognised(tmp_path, name):
    content, match = OTHERS[name]
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=match) as error:
        weights.read(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_a_file(tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        weights.read(tmp_path / "x.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        weights.read(tmp_path / "pipe.pth")


def test_pytorch_is_never_imported(tmp_path, variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would fail
    scconv_jax.save(tmp_path / "x.pth", variables)
    (tmp_path / "y.pth").write_bytes(made.state_dict_file("legacy", made.arrays()))
    assert weights.read(tmp_path / "x.pth").tensors
    assert weights.read(tmp_path / "y.pth").tensors
