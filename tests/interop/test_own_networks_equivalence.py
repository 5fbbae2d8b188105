"""`verify --flax`: a network of the user's own in Flax beside the same one in PyTorch."""

import pytest
import torch

from scconv_jax.cli import main

TORCH = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.body = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)
    def forward(self, x):
        x = self.body(self.stem(x))
        return self.head(x.mean((2, 3)))

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def forward(self, x):
        return self.net(x)
"""
FLAX = """
import flax.linen as nn

class Block(nn.Module):
    activation: str = "relu"
    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(8, (3, 3), padding=1, name="conv")(x)
        y = nn.BatchNorm(use_running_average=not train, epsilon=EPSILON, name="norm")(y)
        return nn.relu(x + y)

class Body(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            x = Block(name=str(i))(x, train)
        return x

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = Body(name="body")(x, train)
        return nn.Dense(5, name="head")(x.mean((1, 2)))

def broken():
    raise RuntimeError("no such luck")

def other():
    return nn.relu
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    (path / "theirs.py").write_text(TORCH)
    (path / "ours.py").write_text(FLAX.replace("EPSILON", "1e-5"))
    (path / "wrong.py").write_text(FLAX.replace("EPSILON", "1.01e-5"))
    names: dict = {}
    exec(TORCH, names)
    torch.manual_seed(0)
    for name in ("Net", "Wrapped"):
        network = names[name]()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        torch.save(network.state_dict(), path / f"{name}.pth")
    return path


def verify(capsys, folder, file, reference, flax, *more, code=0):
    arguments = ["--reference", f"{folder}/theirs.py:{reference}", "--flax", f"{folder}/{flax}", "--sizes", "12", "9x14", *more]
    assert main(["verify", f"{folder}/{file}", *arguments]) == code
    printed = capsys.readouterr()
    rows = [line.split("│")[1].strip() for line in printed.out.splitlines() if line.startswith("│")]
    return rows, printed


def test_equal_at_every_module_of_the_same_name(capsys, folder):
    rows, printed = verify(capsys, folder, "Net.pth", "Net", "ours.py:Net")
    assert rows == ["stem", "body", "head", "output"]
    assert f"Net.pth as {folder}/ours.py:Net: JAX and {folder}/theirs.py:Net" in " ".join(printed.out.split())
    assert "Equal within tolerance at every stage" in printed.out


@pytest.mark.parametrize("more", [(), ("--rename", r"^net\.", "")])
def test_names_that_differ_by_a_prefix(capsys, folder, more):
    rows, _ = verify(capsys, folder, "Wrapped.pth", "Wrapped", "ours.py:Net", *more)
    assert rows == ["stem", "body", "head", "output"]


def test_the_first_module_that_differs_is_named(capsys, folder):
    _, printed = verify(capsys, folder, "Net.pth", "Net", "wrong.py:Net", code=1)
    assert "Not equal: body differs by" in printed.out


@pytest.mark.parametrize(
    ("reference", "flax", "message"),
    [
        ("Net", "ours.py:broken", "RuntimeError: no such luck"),
        ("Net", "ours.py:other", "expected a flax.linen.Module, got"),
        ("Net", "ours.py:nothing", "has no attribute 'nothing'"),
        ("Net", "none.py:Net", "none.py:Net: expected FILE.py:NAME, such as net.py:Net, and a file that exists."),
        ("Wrapped", "ours.py:Net", "Error(s) in loading state_dict for Wrapped"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, reference, flax, message):
    _, printed = verify(capsys, folder, "Net.pth", reference, flax, code=2)
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_the_flax_network_needs_its_counterpart(capsys, folder):
    assert main(["verify", f"{folder}/Net.pth", "--flax", f"{folder}/ours.py:Net"]) == 2
    assert "--flax needs --reference FILE.py:NAME, the same network in PyTorch." in capsys.readouterr().err
