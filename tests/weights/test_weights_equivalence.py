"""Files that PyTorch itself wrote, read as PyTorch reads them; and files of ours, read by PyTorch."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import random
import re
import sys
import uuid

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import scconv_jax
from scconv_jax import weights
from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.torch_files import write_zip
from tests.reference.networks import build
from tests.reference.state import randomise


@pytest.fixture(params=["torch installed", "torch absent"])
def torch_or_not(request, monkeypatch):
    """A function that reads a file, with PyTorch (needed to write it) hidden or not."""

    def read(path):
        with monkeypatch.context() as patch:
            if request.param == "torch absent":
                for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
                    patch.setitem(sys.modules, name, None)
            return weights.read(path)

    return read


LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def write(path, value, legacy, **options):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, **options)


def as_numpy(value):
    value = value.detach()
    return value.float().numpy().astype(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        theirs = as_numpy(tensor)
        assert found[name].shape == theirs.shape, name
        assert found[name].dtype == theirs.dtype, name
        np.testing.assert_array_equal(found[name], theirs, err_msg=name)


def views():
    """Tensors of all kinds of layout and dtype, some of one storage."""
    numbers = torch.arange(24.0).reshape(2, 3, 4)
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    return {
        "whole": numbers,
        "transposed": numbers.permute(2, 0, 1),
        "part": numbers[1, 1:, ::2],
        "same": numbers,
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 1).expand(3, 2),
        "number": torch.tensor(5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        **{str(dtype): torch.tensor([0, 1, 2]).to(dtype) for dtype in dtypes},
    }


@LEGACY
def test_layouts_and_dtypes(tmp_path, legacy, torch_or_not):
    expected = views()
    write(tmp_path / "x.pth", expected, legacy)
    assert_same(torch_or_not(tmp_path / "x.pth").tensors, expected)


@LEGACY
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, legacy, protocol):
    expected = collections.OrderedDict(views())
    write(tmp_path / "x.pth", expected, legacy, pickle_protocol=protocol)
    assert_same(weights.read(tmp_path / "x.pth").tensors, expected)


@LEGACY
@pytest.mark.parametrize("protocol", [2, 4])
def test_sets_beside_the_weights(tmp_path, legacy, protocol):
    value = {"state_dict": {"w": torch.ones(3)}, "seen": {1, 2}, "fixed": frozenset("a"), "none": set()}
    write(tmp_path / "x.pth", value, legacy, pickle_protocol=protocol)
    source = weights.read(tmp_path / "x.pth")
    assert_same(source.tensors, value["state_dict"])
    assert {key: kind.split(".")[-1] for key, kind in source.skipped.items()} == {
        "seen": "set",
        "fixed": "frozenset",
        "none": "set",
    }


@LEGACY
def test_numbers_of_the_other_sign(tmp_path, legacy):
    """The imaginary part of a conjugate is a view of the numbers themselves, with a mark on it."""
    signed = torch.complex(torch.ones(4), torch.arange(4.0)).conj().imag
    assert signed.is_neg()
    write(tmp_path / "x.pth", {"w": signed}, legacy)
    assert_same(weights.read(tmp_path / "x.pth").tensors, {"w": signed.resolve_neg()})


@pytest.mark.parametrize("checksums", [True, False])
def test_archives_with_and_without_checksums(tmp_path, checksums):
    torch.serialization.set_crc32_options(checksums)
    try:
        write(tmp_path / "x.pth", views(), False)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(weights.read(tmp_path / "x.pth").tensors, torch.load(tmp_path / "x.pth"))


@LEGACY
def test_a_checkpoint_of_the_imagenet_script(tmp_path, legacy, torch_or_not):
    """What https://github.com/pytorch/examples/blob/main/imagenet/main.py keeps, and what other scripts add."""
    network = randomise(build("scnet20_small"), 0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    checkpoint = {
        "epoch": 90,
        "arch": "scnet50",
        "state_dict": torch.nn.DataParallel(network).state_dict(),
        "best_acc1": torch.tensor(77.8),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "args": argparse.Namespace(lr=0.1, path="/data"),
        "rng": torch.get_rng_state(),
        "loss": np.float64(1.5),
        "best": np.float32(0.5),
        "history": np.zeros(3),
        "device": torch.device("cpu"),
        "classes": {"a", "b"},
        "size": torch.Size([1, 2]),
        "counts": collections.defaultdict(int, a=1),
        "milestones": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),  # has a Counter
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (what scripts keep)
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "dtype": torch.bfloat16,
        "range": range(3),
        "day": datetime.date(2026, 1, 1),
        "thresholds": {None: 0.5, 0.5: None},
    }
    write(tmp_path / "x.pth", checkpoint, legacy)
    source = torch_or_not(tmp_path / "x.pth")
    assert_same(source.tensors, checkpoint["state_dict"])
    assert set(source.skipped) == set(checkpoint) - {"state_dict"}
    assert source.skipped["args"] == "argparse.Namespace"


class Settings(dict):
    """A dict with attributes, as Lightning's AttributeDict."""


class Level(enum.Enum):
    HIGH = 1


class Choice(enum.Flag):
    ONE = 1
    TWO = 2


def odd_items():
    """What scripts and libraries keep beside the weights, and PyTorch's `weights_only` loader refuses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    settings = Settings(lr=0.1)
    settings.name = "mine"
    return {
        "lr_schedulers": [schedule.state_dict() | {"anneal_func": torch.optim.lr_scheduler.OneCycleLR._annealing_cos}],
        "scheduler": {"anneal_func": schedule._annealing_cos, "step": schedule.step},
        "hyper_parameters": settings,
        "nested": {"deep": [settings, {Level.HIGH: settings}]},
        "args": argparse.Namespace(lr=0.1, level=Level.HIGH, path=pathlib.PurePosixPath("/data")),
        "run": uuid.UUID(int=2**128 - 1),
        "price": decimal.Decimal("0.1"),
        "share": fractions.Fraction(1, 3),
        "level": Level.HIGH,
        "choice": Choice.ONE | Choice.TWO,
        "loss": functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.1),
        "module": torch.nn.Linear(2, 2),
        "phase": 1 + 2j,
        "generator": np.random.default_rng(0),
        "structured": np.zeros(2, [("a", "f4")]),
        "pattern": re.compile("a+"),
        "queue": collections.deque([1, 2]),
        "bytes": bytearray(b"abc"),
        "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "function": write,
        "pairs": {(1, 2): "a", (1, (2, 3)): "b", torch.float32: 3},
        "huge": {2**70: 1, 2**100: 2**500},
        **{name: tensor for name, (tensor, _) in odd_tensors().items()},
    }


def odd_tensors():
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    channels = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8)
    return {
        "complex": (torch.eye(2).to(torch.complex64), r"a complex tensor \(torch\.ComplexFloatStorage\)"),
        "complex double": (torch.eye(2).to(torch.complex128), "a complex tensor"),
        "float8": (torch.ones(2).to(torch.float8_e5m2), "a tensor of a rare dtype"),
        "uint16": (torch.ones(2).to(torch.uint16), "a tensor of a rare dtype"),
        "sparse": (torch.eye(2).to_sparse(), "a sparse tensor"),
        "quantised": (quantised, "a quantised tensor"),
        "by channel": (channels, "a quantised tensor"),
        "meta": (torch.ones(2, device="meta"), r"a tensor without values \(device 'meta'\)"),
    }


@LEGACY
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.filterwarnings("ignore:.*TypedStorage|.*legacy serialization|.*quantiz")
def test_what_is_not_known_stays_inert_and_is_listed(tmp_path, legacy, protocol):
    weights_alone = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    items = odd_items()
    write(tmp_path / "x.pth", {"epoch": 3, **items, "state_dict": weights_alone}, legacy, pickle_protocol=protocol)
    source = weights.read(tmp_path / "x.pth")
    assert_same(source.tensors, weights_alone)
    assert set(source.skipped) == {"epoch", *items}
    assert source.skipped["hyper_parameters"].endswith("test_weights_equivalence.Settings")
    for name, (_, kind) in odd_tensors().items():
        assert re.match(kind, source.skipped[name])


def test_weights_in_a_dict_of_an_unknown_class(tmp_path):
    write(tmp_path / "x.pth", Settings(state_dict=Settings(w=torch.ones(2, 3))), False)
    assert_same(weights.read(tmp_path / "x.pth").tensors, {"w": torch.ones(2, 3)})


@LEGACY
def test_a_wanted_entry_must_be_a_plain_tensor(tmp_path, legacy):
    network = build("scnet20_small")
    state_dict = network.state_dict() | {"fc.weight": network.fc.weight.detach().to_sparse()}
    state_dict["statistics"] = torch.eye(2).to_sparse()
    write(tmp_path / "x.pth", {"module." + key: value for key, value in state_dict.items()}, legacy)
    message = (
        r"must be dense floating-point tensors; these are not: fc\.weight is a sparse tensor \(torch\._utils\._rebuild_sparse"
    )
    with pytest.raises(scconv_jax.ConversionError, match=message):
        scconv_jax.load_model(tmp_path / "x.pth", "scnet20_small", num_classes=10)
    state_dict["fc.weight"] = network.fc.weight
    write(tmp_path / "x.pth", state_dict, legacy)
    assert scconv_jax.load_model(tmp_path / "x.pth")[0] == scconv_jax.create_model("scnet20_small", num_classes=10)


def test_a_tensor_with_attributes(tmp_path):
    tensor = torch.nn.Parameter(torch.randn(3))
    tensor.note = "x"
    write(tmp_path / "x.pth", {"w": tensor}, False)
    assert_same(weights.read(tmp_path / "x.pth").tensors, {"w": tensor})


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear: it is a whole pickled model"),
        ({"w": torch.eye(2).to_sparse()}, "a sparse tensor"),
        ({"w": torch.eye(2).to(torch.complex64)}, "a complex tensor"),
        ({"w": torch.ones(2, device="meta")}, "without values"),
        ({"w": torch.ones(2).to(torch.float8_e5m2)}, "rare dtype"),
        ({"w": torch.ones(2).to(torch.uint16)}, "rare dtype"),
    ],
    ids=["model", "sparse", "complex", "meta", "float8", "uint16"],
)
@LEGACY
def test_what_cannot_be_read_is_named(tmp_path, legacy, value, match):
    write(tmp_path / "x.pth", value, legacy)
    with pytest.raises(WeightsError, match=match):
        weights.read(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is
def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"TorchScript.*torch\.jit\.load"):
        weights.read(tmp_path / "x.pth")


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_pytorch_reads_what_we_write(tmp_path, mmap):
    network = randomise(build("scnet20_small"), 0)
    model = scconv_jax.create_model("scnet20_small")
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 13, 13, 3)), train=False))
    variables = scconv_jax.from_torch(network.state_dict(), template)
    scconv_jax.save(tmp_path / "x.pth", variables)
    found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert type(found) is collections.OrderedDict
    build("scnet20_small").load_state_dict(found, strict=True)
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], value), name


def test_pytorch_reads_every_dtype_that_we_write(tmp_path):
    write(tmp_path / "x.pth", views(), False)
    read = weights.read(tmp_path / "x.pth").tensors
    write_zip(tmp_path / "y.pth", read)
    found = torch.load(tmp_path / "y.pth", weights_only=True)
    assert_same(read, found)
