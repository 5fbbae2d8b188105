"""PyTorch's own loader beside our reader: it must read the same, and is asked of nothing that could hurt."""

import sys

import numpy as np
import pytest
import torch

from scconv_jax import weights
from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.state_dicts import NAMES, PLAIN
from tests.weight_files import arrays, dictionary, legacy_file, named, state_dict_file, tensor, text, whole, zip_file

FORMS = pytest.mark.parametrize("form", ["zip", "legacy"])
MAKE = {"zip": zip_file, "legacy": legacy_file}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pth"


@pytest.fixture
def asked(monkeypatch):
    """The calls of `torch.load`."""
    calls, load = [], torch.load

    def record(*args, **options):
        calls.append(options)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", record)
    return calls


@FORMS
def test_it_reads_the_same(path, form, asked):
    path.write_bytes(state_dict_file(form, arrays()))
    source = weights.read(path)
    assert source.pytorch == f"{torch.__version__} reads the same"
    assert asked == [{"map_location": "cpu", "weights_only": True, "mmap": form == "zip"}]
    assert list(source.tensors) == list(arrays())


def test_it_finds_the_state_dict_in_its_wrapper(path):
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(3)}, "optimizer": {"state": {0: torch.zeros(9)}}}, path)
    source = weights.read(path)
    assert source.pytorch == f"{torch.__version__} reads the same"
    assert source.skipped == {"epoch": "int", "optimizer": "dict"}


OTHERS = {
    "no entry": {},
    "no tensor": {"w": 1},
    "another number": {"w": torch.tensor([1.0, 3.0])},
    "another zero": {"w": torch.tensor([1.0, 2.0]) * torch.tensor([1, -0.0])},
    "another shape": {"w": torch.tensor([[1.0, 2.0]])},
    "another dtype": {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
    "as many bytes": {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_a_file_that_it_reads_otherwise_is_refused(path, value, monkeypatch):
    torch.save({"w": torch.tensor([1.0, 2.0])}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: value)
    message = r"x\.pth cannot be used: PyTorch [\d.]+\S* reads w otherwise than we do: .*\. Do not use it\.$"
    with pytest.raises(WeightsError, match=message):
        weights.read(path)


def test_bits_that_are_no_number_are_compared_as_bits(path):
    torch.save({"w": torch.tensor([float("nan"), -float("inf")]), "b": torch.tensor([float("nan")]).bfloat16()}, path)
    assert weights.read(path).pytorch.endswith("reads the same")


@FORMS
def test_what_is_more_than_tensors_it_is_not_asked_of(path, form, asked):
    """PyTorch's loader makes this set, and takes 2 to the 60th steps to hash what is in it."""
    deep = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    slow = named("builtins.set") + b"(" + b"](" + deep + b"e" + b"tR"
    path.write_bytes(MAKE[form](whole(dictionary([("w", tensor()), ("s", slow)]))))
    source = weights.read(path)
    assert (list(source.tensors), source.skipped) == (["w"], {"s": "builtins.set"})
    assert source.pytorch == "not asked, for there are other objects than tensors"
    assert not asked


@FORMS
def test_a_counter_it_is_not_asked_of(path, form, asked):
    """Ours takes a list of pairs for items; PyTorch's counts, and so hashes, them."""
    counter = named("collections.Counter") + b"(" + text([("a", 1)]) + b"tR"
    path.write_bytes(MAKE[form](whole(dictionary([("w", tensor()), ("c", counter)]))))
    assert weights.read(path).pytorch.startswith("not asked")
    assert not asked


def test_all_that_it_is_asked_of_is_harmless_to_make():
    """Nothing that hashes, repeats or allocates what a file says; a new name must be thought about."""
    assert set(NAMES) >= PLAIN
    assert {name for name in PLAIN if not name.endswith("Storage")} == {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        "collections.OrderedDict",
    }


@pytest.mark.parametrize(("version", "is_asked"), [("2.9.1", False), ("1.13.0+cu117", False), ("2.10.0", True), ("3.0", True)])
def test_unsafe_ones_are_not_asked(path, version, is_asked, asked, monkeypatch):
    path.write_bytes(state_dict_file("zip", arrays()))
    monkeypatch.setattr(torch, "__version__", version)
    found = weights.read(path).pytorch
    assert found == (f"{version} reads the same" if is_asked else f"not asked, for {version} is not safe: 2.10 or later is")
    assert bool(asked) == is_asked


def test_without_it(path, monkeypatch):
    path.write_bytes(state_dict_file("zip", arrays()))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert weights.read(path).pytorch == "not installed"


def test_what_it_refuses_is_said_and_read(path):
    """Its loader knows pickles of protocol 2 and 3; `torch.save` writes others where it is told to."""
    torch.save({"w": torch.ones(3)}, path, pickle_protocol=4)
    source = weights.read(path)
    assert source.pytorch == f"{torch.__version__} refuses it, with UnpicklingError"
    np.testing.assert_array_equal(source.tensors["w"], np.ones(3))


@FORMS
def test_a_storage_beside_the_weights_is_in_the_file_too(path, form):
    """Else PyTorch would be left to find out."""
    missing = tensor(b"(" + text("storage") + named("torch.FloatStorage") + text("7") + text("cpu") + text(4) + b"tQ")
    path.write_bytes(MAKE[form](whole(dictionary([("w", tensor()), ("optimizer", dictionary([("m", missing)]))]))))
    with pytest.raises(WeightsError, match=r"storage 7 is not in its archive|its list of storages is not that of its tensors"):
        weights.read(path)


def test_it_is_not_loaded_for_other_formats(tmp_path, asked):
    weights.save(tmp_path / "x.safetensors", {"params": {"w": np.ones(3, np.float32)}})
    assert weights.read(tmp_path / "x.safetensors").pytorch == ""
    assert not asked
