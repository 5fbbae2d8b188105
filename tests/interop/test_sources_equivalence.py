"""Each source of weights: a file with its own keys gives outputs equal to those of the PyTorch network that wrote it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import linen as nn

from scconv_jax import ScConv, create_model, load, load_model, load_weights
from scconv_jax.cli import main
from scconv_jax.interop.loading import open_checkpoint
from scconv_jax.layers.core import Conv, Dense
from scconv_jax.models.blocks import Bottleneck
from scconv_jax.models.resnet import DeepStem, ResNet
from scconv_jax.models.scnet import SCBottleneck, SCNet
from tests.equivalence import jit, torch_dtype
from tests.reference import scconv as oracles
from tests.reference.namings import MMPose, MMPoseModules, PytorchCV
from tests.reference.networks import build
from tests.reference.state import nchw, nhwc, random_images, randomise

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")

SHALLOW = (1, 2, 1, 1)
SIZES = {"float64": (97, 113), "float32": (193, 161)}
SCNET = partial(SCNet, SCBottleneck, SHALLOW)
V1D = partial(SCNet, partial(SCBottleneck, avd=True, avg_down=True), SHALLOW, stem=partial(DeepStem, (32, 32, 64)))
RESNET = partial(ResNet, Bottleneck, SHALLOW)


def save(network, path, *, wrap=None, legacy=False):
    state_dict = network.state_dict()
    torch.save(state_dict if wrap is None else wrap(state_dict), path, _use_new_zipfile_serialization=not legacy)


def data_parallel(state_dict):
    return {"epoch": 3, "arch": "scnet50", "state_dict": {f"module.{key}": value for key, value in state_dict.items()}}


OLD = {"wrap": data_parallel, "legacy": True}  # DataParallel's names, in the format before PyTorch 1.6

# The network that writes the file, our counterpart, the key convention, and how the file is saved.
SOURCES = {
    "reference": (lambda: build("scnet50", depths=SHALLOW, num_classes=7), SCNET, "reference", {}),
    "reference, old": (lambda: build("scnet50", depths=SHALLOW, num_classes=7), SCNET, "reference", OLD),
    "reference, v1d": (lambda: build("scnet50_v1d", depths=SHALLOW, num_classes=7), V1D, "reference", {}),
    "pytorchcv scnet": (lambda: PytorchCV("scnet", SHALLOW, 7), SCNET, "pytorchcv", {}),
    "pytorchcv scneta": (lambda: PytorchCV("scneta", SHALLOW, 7), V1D, "pytorchcv", {}),
    "pytorchcv resnet-b": (lambda: PytorchCV("resnetb", SHALLOW, 7), RESNET, "pytorchcv", {}),
    "mmpose": (lambda: MMPose(SHALLOW), SCNET, "mmpose", {"wrap": lambda entries: {"meta": {"epoch": 3}, "state_dict": entries}}),
    "mmpose, norm1": (lambda: MMPoseModules(SHALLOW), SCNET, "mmpose", {}),
    "mmpose, conv1.bn": (lambda: MMPoseModules(SHALLOW, "conv{}.bn"), SCNET, "mmpose", {}),
    "torchvision": (lambda: build("resnet50", depths=SHALLOW, num_classes=7), RESNET, "torchvision", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_from_a_file_to_equal_outputs(close, tmp_path, name):
    make, ours, naming, how = SOURCES[name]
    oracle = randomise(make(), 0).eval()
    path = tmp_path / "weights.pth"
    save(oracle, path, **how)
    assert open_checkpoint(path).convention.name == naming
    template = jax.eval_shape(partial(ours(num_classes=7).init, train=False), jax.random.key(0), jnp.zeros((1, 97, 97, 3)))
    variables, notes = load_weights(path, template)
    assert len(notes) == (naming == "mmpose" or name == "pytorchcv resnet-b")
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"), torch.no_grad():
            model = ours(num_classes=7, dtype=jnp.dtype(dtype))
            run = jit(partial(model.apply, train=False, method="features" if naming == "mmpose" else None))
            images = random_images((1, *SIZES[dtype], 3), 1, np.dtype(dtype))
            expected = oracle.to(torch_dtype(np.dtype(dtype)))(nchw(images))
            found = run(variables, jnp.asarray(images))
            if naming == "mmpose":
                close(found["layer4"], nhwc(expected), name)
            else:
                close(found, expected.numpy(), name)


# Whole networks, which are recognised by all their keys and shapes, and the key convention.
NETWORKS = {
    "scnet50_v1d": (lambda: PytorchCV("scneta"), "pytorchcv"),
    "resnet50": (lambda: PytorchCV("resnetb"), "pytorchcv"),
    "scnet50": (MMPose, "mmpose"),
    "ghostnet_100": (lambda: build("ghostnet_100"), "timm-ghostnet"),
    "scnet101": (lambda: PytorchCV("scnet", (3, 4, 23, 3)), "pytorchcv"),
    "scnet101_v1d": (lambda: PytorchCV("scneta", (3, 4, 23, 3)), "pytorchcv"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if "1" in name[:-2] else name for name in NETWORKS])
def test_a_whole_network_is_recognised(tmp_path, name):
    make, naming = NETWORKS[name]
    save(make(), tmp_path / "weights.pth")
    assert open_checkpoint(tmp_path / "weights.pth").convention.name == naming
    model, variables = load_model(tmp_path / "weights.pth")
    assert repr(model) == repr(create_model(name, num_classes=1000))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


class OwnInTorch(torch.nn.Module):
    """A network of a user's, with ScConv somewhere in it."""

    def __init__(self, variant):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 32, 3, 2, 1)
        self.encoder = torch.nn.Sequential(oracles.ScConv(32, variant), torch.nn.ReLU(), oracles.ScConv(32, variant, alpha=0.75))
        self.head = torch.nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.encoder(self.stem(x)).mean(dim=(2, 3)))


class _Encoder(nn.Module):
    variant: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(ScConv(variant=self.variant, name="0")(x))
        return ScConv(variant=self.variant, alpha=0.75, name="2")(x)


class Own(nn.Module):
    variant: str

    @nn.compact
    def __call__(self, x):
        x = Conv(32, 3, strides=2, padding=1, use_bias=True, name="stem")(x)
        return Dense(5, name="head")(_Encoder(self.variant, name="encoder")(x).mean((1, 2)))


@pytest.mark.parametrize("variant", ["2023-07", "2023-09", "2023-10"])
@pytest.mark.usefixtures("x64")
def test_scconv_alone_and_in_a_network_of_ones_own(close, tmp_path, capsys, variant):
    for oracle, model, shape in (
        (oracles.ScConv(32, variant), ScConv(variant=variant), (2, 9, 14, 32)),
        (OwnInTorch(variant), Own(variant), (2, 21, 14, 3)),
    ):
        save(randomise(oracle, 0), tmp_path / "own.pth")
        images = random_images(shape, 1)
        template = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images))
        variables, notes = load_weights(tmp_path / "own.pth", template)
        assert notes == []
        with torch.no_grad():
            expected = oracle.double()(nchw(images))
        expected = nhwc(expected) if expected.ndim == 4 else expected.numpy()
        close(jit(model.apply)(variables, images), expected, f"{variant} in {type(model).__name__}")
        # The command needs to know nothing of the network.
        out = tmp_path / "own.safetensors"
        assert main(["convert", str(tmp_path / "own.pth"), "--model", "any", "--out", str(out), "--force"]) == 0
        jax.tree.map(np.testing.assert_array_equal, load(out).variables, variables)
        capsys.readouterr()


def test_safetensors_with_pytorchs_names(close, tmp_path):
    """What timm's files are."""
    oracle = randomise(build("resnet20_small"), 0).eval()
    safetensors.torch.save_file(oracle.state_dict(), tmp_path / "model.safetensors")
    model, variables = load_model(tmp_path / "model.safetensors")
    images = random_images((2, 13, 21, 3), 1, np.float32)
    with torch.no_grad():
        close(jit(partial(model.apply, train=False))(variables, images), oracle(nchw(images)).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    oracle = randomise(build("scnet20_small"), 0).to(dtype)
    save(oracle, tmp_path / "weights.pth")
    _, variables = load_model(tmp_path / "weights.pth")
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"].T, oracle.fc.weight.detach().float().numpy(), strict=True)


def test_back_into_pytorch(close, tmp_path, capsys):
    """Ours to `.pth`, loaded strictly into PyTorch's network, by PyTorch's own safe loader."""
    oracle = randomise(build("scnet20_small"), 0).eval()
    save(oracle, tmp_path / "theirs.pth")
    for source, out in (("theirs.pth", "ours.safetensors"), ("ours.safetensors", "again.pth")):
        assert main(["convert", str(tmp_path / source), "--out", str(tmp_path / out)]) == 0
    capsys.readouterr()
    again = build("scnet20_small").eval()
    entries = torch.load(tmp_path / "again.pth", weights_only=True)
    again.load_state_dict(entries, strict=True)
    for name, value in oracle.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(entries[name], value), name
    images = nchw(random_images((2, 21, 13, 3), 1, np.float32))
    with torch.no_grad():
        close(again(images).numpy(), oracle(images).numpy())
