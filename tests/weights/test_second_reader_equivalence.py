"""PyTorch's own loader, after our reader: it must read the same, and what it is made to do has limits."""

import json
import os
import resource
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from scconv_jax import load_weights, weights
from scconv_jax.cli import main
from scconv_jax.weights import second_reader
from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.second_reader import confirm
from tests.weight_files import dictionary, named, tensor, whole, zip_file
from tests.weights.test_weights_equivalence import views

SAME = f"{torch.__version__} reads the same"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pth"


@pytest.fixture
def good(path):
    torch.save({"w": torch.tensor([1.0, 2.0])}, path)
    return weights.read(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_it_reads_the_same(path, form):
    """Every layout and dtype, NaN, and numbers of the other sign, behind two wrappers and beside an optimizer."""
    signed = torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag
    entries = {**views(), "no number": torch.tensor([float("nan"), -0.0]), "signed": signed}
    checkpoint = {"optimizer": {"state": {0: torch.zeros(9)}}, "state_dict": {"model": entries, "epoch": 3}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=form == "zip")
    source = weights.read(path)
    np.testing.assert_array_equal(source.tensors["signed"], [0, -1, -2])
    assert source.wrappers == ("state_dict", "model")
    assert confirm(source).text == SAME


OTHERS = {
    "no entry": {},
    "another entry": {"w": torch.tensor([1.0, 2.0]), "w2": torch.ones(1)},
    "another number": {"w": torch.tensor([1.0, 3.0])},
    "another zero": {"w": torch.tensor([1.0, 2.0]) * torch.tensor([1, -0.0])},
    "another shape": {"w": torch.tensor([[1.0, 2.0]])},
    "another dtype": {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
    "no tensor": {"w": 1},
}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_a_file_that_it_reads_otherwise_is_refused(good, path, value):
    """The file is changed after our reader has read it."""
    torch.save(value, path)
    message = r"^.*x\.pth cannot be used: PyTorch [\d.]+\S* reads 'w2?' otherwise than we do\. The file is made to look different"
    with pytest.raises(WeightsError, match=message):
        confirm(good)


@pytest.mark.usefixtures("good")
def test_the_library_asks_too(path, monkeypatch):
    template = {"params": {"bias": np.zeros(2, np.float32)}}
    torch.save({"bias": torch.ones(2)}, path)
    np.testing.assert_array_equal(load_weights(path, template)[0]["params"]["bias"], np.ones(2))
    monkeypatch.setattr(second_reader, "_read", lambda _: {})
    with pytest.raises(WeightsError, match="reads 'bias' otherwise"):
        load_weights(path, template)


@pytest.mark.usefixtures("good")
def test_nothing_is_written_of_a_file_that_it_reads_otherwise(path, capsys, monkeypatch):
    monkeypatch.setattr(second_reader, "_read", lambda _: {})
    assert main(["convert", str(path), "--model", "any", "--out", str(path.with_name("out.pth"))]) == 2
    assert "reads 'w' otherwise than we do" in capsys.readouterr().err
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_it_says_is_in_the_table(path, capsys):
    torch.save({"conv.weight": torch.randn(2, 3, 1, 1)}, path)
    assert main(["convert", str(path), "--model", "any", "--out", str(path.with_name("out.safetensors"))]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"PyTorch's loader │ {SAME}" in printed
    assert "s for PyTorch's loader" in printed


def test_names_as_flax_has_them(path):
    torch.save({"params/conv/kernel": torch.randn(1, 1, 2, 2)}, path)
    source = weights.read(path)
    assert source.tensors is None
    assert confirm(source).text == SAME


def test_a_file_whose_name_is_not_utf_8(tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"n\xff.pth")
    with path.open("wb") as file:  # PyTorch takes no such name
        torch.save({"conv.weight": torch.randn(2, 3, 1, 1)}, file)
    assert main(["convert", str(path), "--model", "any", "--out", str(tmp_path / "out.safetensors")]) == 0
    assert SAME in capsys.readouterr().out
    assert weights.load(tmp_path / "out.safetensors").metadata["source"] == "n\N{REPLACEMENT CHARACTER}.pth"


def test_a_crash_leaves_no_file(path, monkeypatch):
    """To hash tuples 400,000 deep recurses in C."""
    deep = named("builtins.set") + b"(](" + b")" + b"\x85" * 400_000 + b"etR"
    path.write_bytes(zip_file(whole(dictionary([("w", tensor()), ("s", deep)]))))
    monkeypatch.chdir(path.parent)
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        assert confirm(weights.read(path)).text == f"{torch.__version__} did not get through it within its limits"
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_has_one_thread_on_a_machine_of_many_cores(good, monkeypatch):
    """The stacks of a hundred threads are more memory than it has."""
    environment, run = {}, subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: environment.update(options["env"]) or run(*args, **options))
    monkeypatch.setenv("OMP_NUM_THREADS", "96")
    assert confirm(good).text == SAME
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"


def test_a_python_that_cannot_be_started(good, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert confirm(good).text == f"{torch.__version__} could not be started"


def test_a_set_that_takes_it_for_ever_to_hash(path):
    """A tuple of tuples, 60 deep, has two to the 60th leaves; ours makes no set."""
    deep = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    endless = named("builtins.set") + b"(" + b"](" + deep + b"e" + b"tR"
    path.write_bytes(zip_file(whole(dictionary([("w", tensor()), ("s", endless)]))))
    source = weights.read(path)
    start = time.monotonic()
    assert confirm(source).text == f"{torch.__version__} did not get through it within its limits"
    assert time.monotonic() - start < 20


def test_an_archive_that_fills_the_memory(good, path):
    """Ours refuses what is compressed; PyTorch would unpack all of this gigabyte."""
    torch.save({"w": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):
                with archive.open(name, "w", force_zip64=True) as file:
                    file.write(data)
                    for _ in range(1 << 10):
                        file.write(bytes(1 << 20))
            else:
                archive.writestr(name, data)
    found = confirm(good).text
    assert found.startswith((f"{torch.__version__} refuses it, with ", f"{torch.__version__} did not get through it"))
    script = second_reader.__file__.replace("second_reader", "torch_process")
    request = json.dumps({"path": str(path), "wrappers": [], "bytes": path.stat().st_size})
    peak = (
        "import re, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", peak, script, request], capture_output=True, text=True, check=False)
    assert int(done.stderr.split()[-1]) < 1_000_000  # KiB, PyTorch itself among them


def test_what_it_refuses_is_said(path):
    """Its loader knows pickles of protocol 2 and 3; `torch.save` writes others where it is told to."""
    torch.save({"w": torch.ones(3)}, path, pickle_protocol=4)
    assert confirm(weights.read(path)).text == f"{torch.__version__} refuses it, with UnpicklingError"


@pytest.mark.parametrize("value", [3, [torch.ones(2)]])
def test_what_is_no_state_dict_to_it(good, path, value):
    torch.save(value, path)
    assert confirm(good).text == f"{torch.__version__} refuses it, with AttributeError"


@pytest.mark.parametrize(("version", "asked"), [("2.9.1", False), ("1.13.0+cu117", False), ("2.10.0", True), ("3.0", True)])
def test_unsafe_ones_are_not_asked(good, version, asked, monkeypatch):
    monkeypatch.setattr(second_reader, "_version", lambda: version)
    monkeypatch.setattr(second_reader, "_read", lambda _: "was asked")
    assert confirm(good).text == (f"{version} was asked" if asked else f"not asked: {version} is not safe, 2.10 or later is")


def test_without_it(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert confirm(good).text == "not installed"


@pytest.mark.parametrize("path_of_modules", ["", ":"])
def test_something_else_called_torch(good, tmp_path, monkeypatch, path_of_modules):
    """A folder of that name in the place that we are in is neither imported nor taken for PyTorch."""
    tmp_path.joinpath("torch").mkdir()
    tmp_path.joinpath("torch/__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path_of_modules)
    assert confirm(good).text == SAME


def test_other_formats_are_none_of_its_own(tmp_path, monkeypatch):
    weights.save(tmp_path / "x.safetensors", {"params": {"w": np.ones(3, np.float32)}})
    monkeypatch.setattr(second_reader, "_version", lambda: pytest.fail("asked"))
    assert confirm(weights.read(tmp_path / "x.safetensors")).text == ""
