"""`python -m scconv_jax verify`, and the PyTorch counterparts that it compares with."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from scconv_jax.cli import main
from scconv_jax.cli.verify import _conclusion
from scconv_jax.interop import verification as verify_module
from scconv_jax.interop.torch_ghostnet import TorchGhostNet
from scconv_jax.interop.torch_networks import TorchResNet
from scconv_jax.interop.verification import Difference, _relative
from tests.reference.namings import MMPose, MMPoseModules, PytorchCV, PytorchCVGhostNet
from tests.reference.networks import build
from tests.reference.state import nchw, random_images, randomise

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")

ROOT = Path(__file__).parents[2]
SHALLOW = (1, 2, 1, 1)
SIZES = {32: (97, 113), 16: (49, 71), 8: (25, 39), 4: (13, 21)}

# (network, key convention, output stride)
COUNTERPARTS = {
    "scnet50 dilated by 8": (lambda: build("scnet50", depths=SHALLOW, output_stride=8), "reference", 8),
    "scnet50_v1d": (lambda: build("scnet50_v1d", depths=SHALLOW), "reference", 32),
    "scnet50_v1d dilated by 16": (lambda: build("scnet50_v1d", depths=SHALLOW, output_stride=16), "reference", 16),
    "se_scnet50": (lambda: build("se_scnet50", depths=SHALLOW), "reference", 32),
    "scnext50": (lambda: build("scnext50", depths=SHALLOW), "reference", 32),
    "resnet50": (lambda: build("resnet50", depths=SHALLOW), "torchvision", 32),
    "resnext29_small": (lambda: build("resnext29_small", depths=SHALLOW[:3]), "own", 4),
    "scconv_resnet56_small": (lambda: build("scconv_resnet56_small", depths=SHALLOW[:3]), "own", 4),
    "scconv_resnet20_small": (lambda: build("scconv_resnet20_small", depths=SHALLOW[:3]), "own", 4),
    "ghost_resnet56_small": (lambda: build("ghost_resnet56_small", depths=SHALLOW[:3]), "own", 4),
    "pytorchcv's scnet": (lambda: PytorchCV("scnet", SHALLOW), "pytorchcv", 32),
    "pytorchcv's scneta": (lambda: PytorchCV("scneta", SHALLOW), "pytorchcv", 32),
    "pytorchcv's resnet-b": (lambda: PytorchCV("resnetb", SHALLOW), "pytorchcv", 32),
    "mmpose's scnet": (lambda: MMPose(SHALLOW), "mmpose", 32),
    "mmpose's scnet, norm1": (lambda: MMPoseModules(SHALLOW), "mmpose", 32),
    "mmpose's scnet, conv1.bn": (lambda: MMPoseModules(SHALLOW, "conv{}.bn"), "mmpose", 32),
}


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_counterparts_are_the_oracles(close, name):
    make, naming, output_stride = COUNTERPARTS[name]
    oracle = randomise(make(), 0).double().eval()
    entries = {key: value.numpy() for key, value in oracle.state_dict().items()}
    images = nchw(random_images((2, *SIZES[output_stride], 3), 1))
    with torch.no_grad():
        maps = TorchResNet(entries, naming, output_stride, "paper", "float64")(images)
        expected = oracle(images)
    found = maps["logits"] if expected.ndim == 2 else maps["layer4"]
    close(found.numpy(), expected.numpy())


@pytest.mark.parametrize(
    ("make", "naming"), [(partial(build, "ghostnet_100"), "timm-ghostnet"), (PytorchCVGhostNet, "pytorchcv-ghostnet")]
)
def test_counterparts_of_ghostnet(close, make, naming):
    oracle = randomise(make(), 0).double().eval()
    entries = {key: value.numpy() for key, value in oracle.state_dict().items()}
    images = nchw(random_images((2, 65, 97, 3), 1))
    with torch.no_grad():
        maps = TorchGhostNet(entries, naming, "float64")(images)
        close(maps["logits"].numpy(), oracle(images).numpy())
    assert list(maps) == ["stem", "layer1", "layer2", "layer3", "layer4", "layer5", "logits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of small networks."""
    path = tmp_path_factory.mktemp("verify")
    for name in ("scnet20_small", "scconv_resnet20_small"):
        torch.save(randomise(build(name), 0).state_dict(), path / f"{name}.pth")
    torch.save(randomise(build("resnet20_small"), 0).state_dict(), path / "resnet20_small.pth")
    path.joinpath("mine.py").write_text(
        "from functools import partial\n"
        "import torch\n"
        "from tests.reference.networks import build\n"
        "right = partial(build, 'scnet20_small')\n"
        "def unlike():\n"
        "    network = right()\n"
        "    network.layer2.register_forward_hook(lambda module, inputs, output: output.tanh())\n"
        "    return network\n"
        "def wrong_epsilon():\n"
        "    network = right()\n"
        "    network.layer2[0].bn3.eps *= 1.01\n"
        "    return network\n"
        "def deeper():\n"
        "    return build('resnet20_small')\n"
        "def fails():\n"
        "    raise RuntimeError('no such luck')\n"
        "def quits():\n"
        "    raise SystemExit(3)\n"
        "def keywords(pretrained=False, **kwargs):\n"
        "    return build('scnet20_small', **kwargs)\n"
    )
    return path


def verify(capsys, folder, name, *arguments, code=0):
    assert main(["verify", str(folder / name), *arguments]) == code
    return capsys.readouterr()


def test_equal(capsys, folder, tmp_path):
    """Also for a file with a prefix, names of its own and another module beside the network."""
    entries = torch.load(folder / "scnet20_small.pth")
    theirs = {f"net.{key.replace('conv1_a', 'first')}": value for key, value in entries.items()}
    torch.save({**theirs, "criterion.center": torch.ones(3)}, tmp_path / "theirs.pth")
    out = verify(capsys, tmp_path, "theirs.pth", "--sizes", "32", "21x27", "--rename", "first", "conv1_a").out
    assert "theirs.pth as scnet20_small: JAX and PyTorch" in out
    assert "note: The keys were taken without their prefix 'net'." in out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows == ["stem", "layer1", "layer2", "layer3", "logits"]
    assert "Equal within tolerance at every stage" in out


def test_jax_computes_on_the_cpu(capsys, folder, monkeypatch):
    """Whatever device a program computes on: others round float32 to fewer digits."""
    devices, compiled = set(), verify_module._compiled

    def recorded(*args, **options):
        run = compiled(*args, **options)

        def record(*inputs):
            outputs = run(*inputs)
            devices.update(*(leaf.devices() for leaf in jax.tree.leaves(outputs)))
            return outputs

        return record

    monkeypatch.setattr(verify_module, "_compiled", recorded)
    with jax.default_device(jax.devices()[3]):
        verify(capsys, folder, "scnet20_small.pth", "--sizes", "32")
    assert devices == {jax.devices("cpu")[0]}


def test_beside_a_file_of_the_users_own_within_a_tolerance(capsys, folder):
    arguments = ["--reference", f"{folder}/mine.py:right", "--sizes", "24", "--tolerance", "1e-9"]
    out = verify(capsys, folder, "scnet20_small.pth", *arguments, code=1).out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows == ["stem", "layer1", "layer2", "layer3", "logits"]
    assert "float32 (limit 1e-09)" in out
    assert "in float32" in out


def test_the_reference_has_the_files_number_of_classes(capsys, folder, tmp_path):
    """Though only `**kwargs` of the reference takes it, as in SCNet's own code; and though another head was asked for."""
    entries = randomise(build("scnet20_small", num_classes=7), 0).state_dict()
    wrapped = {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in entries.items()}}
    torch.save({**wrapped, "criterion.center": torch.ones(3)}, tmp_path / "seven.pth")
    arguments = ["--reference", f"{folder}/mine.py:keywords", "--sizes", "24"]
    assert "logits" in verify(capsys, tmp_path, "seven.pth", *arguments).out
    assert "logits" not in verify(capsys, tmp_path, "seven.pth", *arguments, "--num-classes", "3").out


def test_what_is_no_number_is_not_equal(capsys, folder, tmp_path):
    entries = torch.load(folder / "scnet20_small.pth")
    entries["layer2.0.bn3.weight"][0] = torch.nan
    torch.save(entries, tmp_path / "nan.pth")
    out = verify(capsys, tmp_path, "nan.pth", "--sizes", "24", code=1).out
    assert "Not equal: layer2 differs by inf" in out
    assert "note: 1 values are NaN or infinite" in out


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_differences_of_what_is_no_number(side, value):
    maps = [np.zeros((2, 3, 3, 1)), np.zeros((2, 3, 3, 1))]
    maps[side][1, 0, 0, 0] = value
    assert _relative(*maps).tolist() == [0, np.inf]


def test_a_network_that_computes_something_else(capsys, folder):
    """The first stage that differs is named."""
    out = verify(capsys, folder, "scnet20_small.pth", "--reference", f"{folder}/mine.py:unlike", "--sizes", "24", code=1).out
    assert "Not equal: layer2 differs by" in out


def amplifying(folder, name, factor):
    """Write a network whose second stage amplifies rounding: a norm subtracts a large mean and adds it again."""
    entries = torch.load(folder / "scnet20_small.pth")
    weight, bias, mean, var = (entries[f"layer2.0.bn1_a.{kind}"] for kind in ("weight", "bias", "running_mean", "running_var"))
    mean += factor
    bias += factor * weight / (var + 1e-5).sqrt()
    torch.save(entries, folder / name)


def test_rounding_that_a_network_amplifies_is_no_difference(capsys, folder):
    amplifying(folder, "amplifies.pth", 1e5)
    out = verify(capsys, folder, "amplifies.pth", "--sizes", "24").out
    assert "note: this network amplifies rounding, as untrained networks do, so some limits are higher: those in brackets." in out
    assert "Equal within tolerance at every stage in float64; in float32, rounding hides layer2" in out
    assert "layer2 differs by" in verify(capsys, folder, "amplifies.pth", "--sizes", "24", "--tolerance", "2e-5", code=1).out


def test_a_small_mistake_is_found_in_a_network_that_amplifies_rounding(capsys, folder):
    amplifying(folder, "amplifies.pth", 1e5)
    reference = ["--reference", f"{folder}/mine.py:wrong_epsilon", "--sizes", "24"]
    assert "Not equal: layer2 differs by" in verify(capsys, folder, "amplifies.pth", *reference, code=1).out


def test_rounding_that_hides_everything_is_no_verdict():
    fine, hidden, wrong = (Difference("layer2", "float64", value, "noise", (3, 3), 1e-12, 0.2) for value in (1e-14, 1e-3, 1.0))
    code, sentence = _conclusion([fine, hidden])
    assert code == 3
    assert sentence.startswith(
        "Cannot be told in float64: layer2 differs by 1.0e-03, and rounding alone can make that difference."
    )
    assert _conclusion([hidden, wrong]) == (1, "Not equal: layer2 differs by 1.0e+00 in float64")


def test_verdicts():
    def verdict(value, rounding):
        return Difference("stem", "float64", value, "noise", (3, 3), 1e-12, rounding).verdict

    assert [verdict(1e-13, 0), verdict(1e-11, 2e-11), verdict(1e-2, 2e-2)] == ["equal", "equal", "unclear"]
    assert [verdict(1e-11, 0), verdict(1e-11, 5e-12), verdict(np.inf, np.inf), verdict(np.nan, 1)] == ["differs"] * 4


def test_branches_confused_by_a_renaming(capsys, folder):
    """The counterpart has the file's own names, so that it does not repeat a mistake in ours."""
    swap = ["--rename", r"1_a\.", "1_x.", "--rename", r"1_b\.", "1_a.", "--rename", r"1_x\.", "1_b."]
    out = verify(capsys, folder, "scnet20_small.pth", *swap, "--sizes", "24", code=1).out
    assert "Not equal: layer1 differs by" in out


def test_scconv_is_judged_in_float64(capsys, folder):
    """The entries are those of the public code of 2023-10."""
    out = verify(capsys, folder, "scconv_resnet20_small.pth", "--sizes", "33x29", "--tolerance", "1e-9").out
    assert "note: ScConv's gate is a step." in out
    assert "float32 (not judged)" in out
    assert "Equal within tolerance" in out


def test_small_networks_are_compared_at_small_sizes(capsys, folder, monkeypatch):
    sizes = []
    monkeypatch.setattr("scconv_jax.cli.verify.compare", lambda *_, **options: sizes.extend(options["sizes"]) or ())
    verify(capsys, folder, "resnet20_small.pth")
    assert sizes == [(32, 32), (40, 40), (33, 27)]


def test_a_head_drawn_anew_is_not_compared(capsys, folder):
    out = verify(capsys, folder, "resnet20_small.pth", "--num-classes", "3", "--sizes", "24").out
    assert "logits" not in out
    assert "note: The file's head has 10 classes, the network 3: fc keeps its initial values." in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "any"], "verify needs a network to run; --model any names none."),
        (["--sizes", "big"], "--sizes big: expected pixels, 224 or 193x161."),
        (["--sizes", "²"], "--sizes ²: expected pixels, 224 or 193x161."),
        (["--tolerance", "nan"], "--tolerance nan: expected a number above 0."),
        (["--tolerance", "-1"], "--tolerance -1: expected a number above 0."),
        (["--sizes", "9"], "This network needs images of at least 13×13 px; got 9×9."),
        (
            ["--reference", "mine.py"],
            "--reference mine.py: expected FILE.py:NAME, such as scnet.py:scnet50, and a file that exists.",
        ),
        (["--reference", "FOLDER/mine.py:nothing"], "AttributeError: module 'reference' has no attribute 'nothing'"),
        (["--reference", "FOLDER/mine.py:fails"], "RuntimeError: no such luck"),
        (["--reference", "FOLDER/mine.py:quits"], "SystemExit: 3"),
        (["--reference", "FOLDER/mine.py:deeper"], "RuntimeError: Error(s) in loading state_dict for ResNet: Missing key(s)"),
        (
            ["--reference", "FOLDER/mine.py:right", "--output-stride", "2", "--sizes", "24"],
            "layer3 has the shape (5, 12, 12, 256) here",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, folder, arguments, message):
    given = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    printed = verify(capsys, folder, "scnet20_small.pth", *given, code=2)
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_network_without_a_counterpart(capsys, tmp_path):
    torch.save(build("wrn28_10_small").state_dict(), tmp_path / "wrn.pth")
    printed = verify(capsys, tmp_path, "wrn.pth", code=2)
    assert "wrn28_10_small has no PyTorch counterpart here; give one by --reference FILE.py:NAME." in printed.err


@pytest.mark.slow
def test_the_size_that_networks_are_used_at(capsys, tmp_path):
    """SCNet-50 at 224 px, and dilated, in both precisions, from a file on disk."""
    torch.save({"state_dict": randomise(build("scnet50"), 0).state_dict()}, tmp_path / "scnet50.pth")
    out = verify(capsys, tmp_path, "scnet50.pth", "--sizes", "224x224").out
    assert "Equal within tolerance at every stage" in out
    out = verify(capsys, tmp_path, "scnet50.pth", "--output-stride", "8", "--sizes", "97x113").out
    assert "Equal within tolerance at every stage" in out


@pytest.mark.slow
@pytest.mark.parametrize("make", [partial(build, "ghostnet_100"), PytorchCVGhostNet])
def test_ghostnet(capsys, tmp_path, make):
    torch.save(randomise(make(), 0).state_dict(), tmp_path / "ghostnet.pth")
    out = verify(capsys, tmp_path, "ghostnet.pth", "--sizes", "65x97").out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows == ["stem", "layer1", "layer2", "layer3", "layer4", "layer5", "logits"]


@pytest.mark.slow
def test_pytorchcvs_v1d_beside_its_own_network(capsys, tmp_path):
    torch.save(randomise(PytorchCV("scneta", num_classes=10), 0).state_dict(), tmp_path / "scneta50.pth")
    tmp_path.joinpath("pytorchcv.py").write_text(
        "from tests.reference.namings import PytorchCV\n"
        "def scneta50(num_classes=1000):\n"
        "    return PytorchCV('scneta', num_classes=num_classes)\n"
    )
    out = verify(capsys, tmp_path, "scneta50.pth", "--reference", f"{tmp_path}/pytorchcv.py:scneta50", "--sizes", "193x161").out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows[1:] == ["layer1", "layer2", "layer3", "layer4", "logits"]
    assert np.isin("stem", rows)
