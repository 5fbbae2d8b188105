"""Key conventions: how a checkpoint's is identified, and what its keys become here."""

import numpy as np
import pytest

from scconv_jax import ConversionError
from scconv_jax.interop.conventions import CONVENTIONS, by_name, identify, scconv_options
from scconv_jax.interop.conversion import rename_keys

# A few keys of each, copied from lists of real entries if there are any, else from the sources' attributes.
FIRST = {
    "reference": ["conv1.weight", "layer1.0.conv1_a.weight", "layer1.0.scconv.k2.1.weight"],
    "pytorchcv": ["features.init_block.conv1.conv.weight", "features.stage1.unit1.body.conv1a.conv.weight"],
    "pytorchcv-ghostnet": ["features.init_block.conv.weight", "features.stage1.unit1.body.exp_conv.main_conv.conv.weight"],
    "mmpose": ["backbone.conv1.weight", "backbone.layer1.0.conv1.weight", "backbone.layer1.0.k1.0.weight"],
    "torchvision": ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.conv2.weight"],
    "timm-ghostnet": ["conv_stem.weight", "blocks.0.0.ghost1.primary_conv.0.weight"],
    "own": ["encoder.0.weight", "encoder.1.SRU.gn.weight"],
}


def test_every_naming_is_tried():
    assert {convention.name for convention in CONVENTIONS} | {"own"} == set(FIRST)


@pytest.mark.parametrize("name", FIRST)
def test_a_naming_is_recognised(name):
    assert identify(FIRST[name]).name == name


@pytest.mark.parametrize("name", [name for name in FIRST if name != "own"])
def test_one_name_alone_is_not_enough(name):
    assert identify(FIRST[name][:1]).name == "own"


@pytest.mark.parametrize(
    ("convention", "theirs", "ours"),
    [
        ("pytorchcv", "features.init_block.conv.conv.weight", "conv1.weight"),
        ("pytorchcv", "features.init_block.conv.bn.running_var", "bn1.running_var"),
        ("pytorchcv", "features.init_block.conv1.bn.bias", "conv1.1.bias"),
        ("pytorchcv", "features.init_block.conv2.conv.weight", "conv1.3.weight"),
        ("pytorchcv", "features.init_block.conv3.conv.weight", "conv1.6.weight"),
        ("pytorchcv", "features.init_block.conv3.bn.weight", "bn1.weight"),
        ("pytorchcv", "features.stage3.unit23.body.conv2b.down.conv.bn.running_mean", "layer3.22.scconv.k2.2.running_mean"),
        ("pytorchcv", "features.stage3.unit23.body.conv2b.conv2.conv.weight", "layer3.22.scconv.k4.0.weight"),
        ("pytorchcv", "features.stage1.unit1.body.conv2a.bn.weight", "layer1.0.k1.1.weight"),
        ("pytorchcv", "features.stage1.unit1.body.conv2.bn.weight", "layer1.0.bn2.weight"),
        ("pytorchcv", "features.stage1.unit1.identity_conv.conv.weight", "layer1.0.downsample.0.weight"),
        ("pytorchcv", "features.stage1.unit1.identity_block.bn.weight", "layer1.0.downsample.1.weight"),
        ("pytorchcv", "features.stage2.unit1.identity_block.conv.conv.weight", "layer2.0.downsample.1.weight"),
        ("pytorchcv", "features.stage2.unit1.identity_block.conv.bn.weight", "layer2.0.downsample.2.weight"),
        ("pytorchcv", "output.bias", "fc.bias"),
        (
            "pytorchcv-ghostnet",
            "features.stage1.unit1.body.pw_conv.cheap_conv.bn.bias",
            "blocks.0.0.ghost2.cheap_operation.1.bias",
        ),
        ("pytorchcv-ghostnet", "features.stage4.unit1.body.dw_conv.conv.weight", "blocks.5.0.conv_dw.weight"),
        ("pytorchcv-ghostnet", "features.stage5.unit5.body.se.conv2.bias", "blocks.8.3.se.conv_expand.bias"),
        ("pytorchcv-ghostnet", "output.conv2.bias", "classifier.bias"),
        ("mmpose", "backbone.conv1.weight", "conv1.weight"),
        ("mmpose", "backbone.bn1.bias", "bn1.bias"),
        ("mmpose", "backbone.layer2.3.conv1.weight", "layer2.3.conv1_a.weight"),
        ("mmpose", "layer2.3.bn2.running_var", "layer2.3.bn1_b.running_var"),
        ("mmpose", "backbone.layer2.0.conv3.weight", "layer2.0.conv3.weight"),
        ("mmpose", "backbone.layer2.0.downsample.1.weight", "layer2.0.downsample.1.weight"),
    ],
)
def test_names_become_ours(convention, theirs, ours):
    assert list(rename_keys({theirs: np.zeros(())}, by_name(convention).rename)) == [ours]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conv1.0.weight", "layer1.0.conv1.weight"], r"This looks like a ResNet-C or -D \(for example timm's resnet50d\)"),
    ],
)
def test_what_computes_something_else_is_refused(names, message):
    with pytest.raises(ConversionError, match=message):
        identify(names)


def test_the_stem_alone_makes_no_resnet_d():
    """scnet50_v1d has such a stem too."""
    assert identify(["conv1.0.weight", *FIRST["reference"]]).name == "reference"


def test_pytorchcvs_two_resnets_cannot_be_told_apart():
    names = ["features.init_block.conv.conv.weight", "features.stage1.unit1.body.conv1.conv.weight"]
    assert "resnet50b has its stride in the 3×3" in identify(names).caution
    assert identify(FIRST["pytorchcv"]).caution == ""


def test_a_naming_that_does_not_exist():
    with pytest.raises(ConversionError, match=r"There is no key convention 'pytorch'\. Did you mean 'pytorchcv'"):
        by_name("pytorch")


@pytest.mark.parametrize("prefix", ["", "backbone.stages.1.2."])
@pytest.mark.parametrize(
    ("variant", "entries"),
    [
        ("2023-07", {"SRU.gn.gamma": (16, 1, 1), "SRU.gn.beta": (16, 1, 1)}),
        ("2023-09", {"SRU.gn.weight": (16, 1, 1), "SRU.gn.bias": (16, 1, 1)}),
        ("2023-10", {"SRU.gn.weight": (16,), "SRU.gn.bias": (16,)}),
    ],
)
def test_the_versions_of_scconv(prefix, variant, entries):
    entries = {prefix + name: np.zeros(shape) for name, shape in entries.items()}
    assert scconv_options(entries) == {"variant": variant}
    squeezes = {f"{prefix}CRU.squeeze1.weight": np.zeros((6, 12, 1, 1)), f"{prefix}CRU.squeeze2.weight": np.zeros((2, 4, 1, 1))}
    assert scconv_options(entries | squeezes) == {"variant": variant, "alpha": 0.75}
