"""The records of the networks: complete, true, and readable; and what `create_model` answers to habits of other libraries."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax import create_model, feature_info, list_models, list_pretrained, model_info, models
from scconv_jax.models.registry import ADVICE, MODELS

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")


def small(model):
    """The same network with one block per stage, which is traced sooner and has the same maps."""
    sizes = getattr(model, "stage_sizes", None)
    return model if sizes is None else model.clone(stage_sizes=(1,) * len(sizes))


def traced(model, size):
    """Channels and stride of each map of images of `size`×`size`, from the traced network."""

    def maps(images):
        return model.init_with_output(jax.random.key(0), images, train=False, method="features")[0]

    found = jax.eval_shape(maps, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return {stage: (value.shape[3], size // value.shape[1]) for stage, value in found.items()}


def output_strides(name):
    if "output_stride" not in model_info(name).options:
        return [None]
    last = max(stride for _, stride in feature_info(name).values())
    return [last, last // 2, last // 4]


@pytest.mark.parametrize(("name", "stride"), [(name, stride) for name in list_models() for stride in output_strides(name)])
def test_feature_info_is_what_the_traced_network_returns(name, stride):
    options = {} if stride is None else {"output_stride": stride}
    model = create_model(name, **options)
    found = feature_info(name, **options)
    assert found == feature_info(model) == traced(small(model), 128)
    assert [type(value) for value in found.values()] == [models.Feature] * len(found)


@pytest.mark.parametrize(
    "model",
    [
        models.ResNet(models.BasicBlock, (1, 1), planes=(8, 16), output_stride=8),
        models.SCNet(models.SCBottleneck, (1, 1, 1, 1)),
        models.WideResNet(depth=10, width=2),
        models.DenseNet(block_sizes=(1, 2), growth=8),
    ],
    ids=["ResNet", "SCNet", "WideResNet", "DenseNet"],
)
def test_feature_info_of_a_network_of_ones_own(model):
    assert feature_info(model) == traced(model, 128)


def test_feature_info_of_unknown_modules():
    class Block(nn.Module):
        planes: int

    with pytest.raises(ValueError, match=r"give the block an attribute `expansion`, its output channels divided by `planes`"):
        feature_info(models.ResNet(Block, (1, 1), planes=(8, 16), output_stride=8))
    with pytest.raises(ValueError, match="Dense has no method feature_info"):
        feature_info(nn.Dense(3))
    with pytest.raises(ValueError, match="output_stride: a module already has its options"):
        feature_info(create_model("scnet50"), output_stride=8)
    with pytest.raises(ValueError, match=r"There is no model 'scnet5'\. Did you mean 'scnet50'"):
        feature_info("scnet5")


@pytest.mark.parametrize("name", list_models())
def test_every_record_is_complete_and_true(name):
    spec = model_info(name)
    model = create_model(name)
    assert spec.name == name
    assert spec.image_size == model.image_size == (32 if name.endswith("_small") else 224)
    assert {"num_classes", "dtype", "axis_name"} <= set(spec.options)
    assert all(meaning.endswith(".") for meaning in spec.options.values())
    for option in set(spec.options) - {"alpha", "variant"}:  # ScConv's are arguments of the layer, not fields of the network
        assert hasattr(model, option)
    assert ("alpha" in spec.options) == ("variant" in spec.options) == name.startswith("scconv_")
    assert ("output_stride" in spec.options) == (spec.counterpart == "resnet") == isinstance(model, models.ResNet)
    assert (spec.counterpart == "ghostnet") == isinstance(model, models.GhostNet)
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        create_model(name, nonsense=1)


@pytest.mark.parametrize("name", ["resnet20_small", "wrn28_10_small", "densenet121_small", "ghostnet_100", "scnet20_small"])
def test_the_head_and_the_smallest_image(name):
    spec = model_info(name)
    init = partial(create_model(name, num_classes=7).init, train=False)
    smallest = spec.smallest_image
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, smallest, smallest, 3)))
    assert variables["params"][spec.classifier]["bias"].shape == (7,)
    if smallest > 1:
        with pytest.raises(ValueError, match=f"at least {smallest}×{smallest}"):
            jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, smallest - 1, smallest, 3)))


def test_a_record_is_readable():
    text = str(model_info("scnet50"))
    for part in (
        "25,564,584",
        "3,937,409,856 at 224×224 px",
        "97×97 px",
        "layer4: 2048 channels, stride 32",
        "resize 256, crop 224, mean (0.485, 0.456, 0.406)",
        "scnet50-dc6a7e87.pth (SHA-256 dc6a7e87…)",
        "reference, pytorchcv, mmpose",
        "output_stride: Image size divided by",
        "2020, SCNet-50: 25.6 M, 4.0 G, top-1 77.81 %",
        "verify          resnet",
    ):
        assert part in text
    assert "weights         none published" in str(model_info("scnet20_small"))


def test_published_weights():
    assert list_pretrained() == list_models(pretrained=True) == ["scnet101", "scnet50", "scnet50_v1d"]
    for name in list_pretrained():
        spec = model_info(name)
        assert re.fullmatch(rf"https://\S+/{name}-{spec.sha256}\.pth", spec.weights)
    assert model_info("resnet50").sha256 is None


def test_names_by_pattern():
    assert list_models() == sorted(MODELS)
    assert list_models("scnet50*") == ["scnet50", "scnet50_v1d"]
    assert list_models("*_v1d", pretrained=True) == ["scnet50_v1d"]
    assert list_models("SCNET*") == []


def test_rows_of_the_papers():
    """Facts: the sizes that the papers print, in millions and billions, and the accuracies, in percent."""
    rows = {(row.paper, row.label, spec.name): row for spec in MODELS.values() for row in spec.rows}
    assert len(rows) == 24
    assert rows[2020, "SCNet-50", "scnet50"][2:5] == (25.6, 4.0, 77.81)
    assert rows[2023, "ResNet-50, α = 3/4", "scconv_resnet50"].options == {"alpha": 0.75}
    assert sum(row.parameters for row in rows.values()) == pytest.approx(605.42)
    assert sum(row.multiply_adds for row in rows.values()) == pytest.approx(95.34939)
    assert sum(row.top1 for row in rows.values()) == pytest.approx(1877.30)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "pretrained",
            r"Flax keeps weights outside of the network; model, variables = scconv_jax\.load_model\('scnet50'\) returns both",
        ),
        ("in_chans", "Use in_channels."),
        ("drop_rate", "Use dropout, before the head."),
        ("drop_path_rate", "Use drop_path."),
        ("drop_block_rate", "There is no DropBlock"),
        ("frozen_stages", r'Use frozen=\("stem", "layer1"\)'),
        ("grad_checkpointing", "Use rematerialise=True."),
        ("include_top", "Use num_classes=0"),
        ("global_pool", 'The head averages the last map; method="pooled"'),
        ("features_only", 'method="features"'),
        ("out_indices", "feature_info"),
        ("num_features", "feature_info"),
        ("stem_pool", r"build another with the classes of scconv_jax\.models"),
        ("num_clases", "Did you mean 'num_classes'"),
    ],
)
def test_habits_of_other_libraries(option, message):
    with pytest.raises(ValueError, match=f"Model 'scnet50' has no option '{option}'.*{message}") as error:
        create_model("scnet50", **{option: True})
    assert str(error.value).endswith(f"Its options: {', '.join(model_info('scnet50').options)}.")


def test_weights_that_were_not_published():
    with pytest.raises(
        ValueError, match=r"load_model\(SOURCE, num_classes=10\).*only scnet101, scnet50, scnet50_v1d have published"
    ):
        create_model("resnet50", pretrained=True, num_classes=10)
    assert create_model("resnet50", pretrained=False) == create_model("resnet50")


@pytest.mark.parametrize("name", ["ghostnet_100", "densenet121_small"])
@pytest.mark.parametrize("option", ["drop_path", "drop_path_rate"])
def test_networks_without_residual_blocks_have_no_drop_path(name, option):
    with pytest.raises(ValueError, match=f"has no option '{option}'. It has no residual blocks that training could leave out."):
        create_model(name, **{option: 0.1})


def test_no_advice_hides_an_option():
    assert not set(ADVICE) & {option for spec in MODELS.values() for option in spec.options}


@pytest.mark.parametrize("value", [None, "10", -1, True, 2.0, (10,)])
@pytest.mark.usefixtures("unchecked")
def test_num_classes_is_checked_before_flax(value):
    with pytest.raises(ValueError, match=re.escape(f"num_classes={value!r} must be 0, for no head, or a positive integer.")):
        create_model("scnet50", num_classes=value)


@pytest.mark.parametrize("value", [True, 64, (64, 128)])
@pytest.mark.usefixtures("unchecked")
def test_planes_are_checked_before_flax(value):
    with pytest.raises(ValueError, match=re.escape(f"planes={value!r} must be a tuple with the width of each of the 4 stages.")):
        create_model("scnet50", planes=value)


@pytest.mark.parametrize("value", [4, "8", True, None, 0, 64])
@pytest.mark.usefixtures("unchecked")
def test_output_stride_is_checked_before_flax(value):
    expected = f"output_stride={value!r} is not possible for this network. It can be 32, or with dilation 16 or 8."
    with pytest.raises(ValueError, match=re.escape(expected)):
        create_model("scnet50", output_stride=value)


@pytest.mark.parametrize("value", ["floaty", int, None, jnp.int8, jnp.complex64, 3])
@pytest.mark.usefixtures("unchecked")
def test_dtype_is_checked_before_flax(value):
    with pytest.raises(ValueError, match=r"is not a floating-point dtype\..* Use jnp\.float32, jnp\.bfloat16"):
        create_model("scnet50", dtype=value)


@pytest.mark.parametrize("value", [jnp.bfloat16, "bfloat16", np.dtype("float16"), jnp.float64])
@pytest.mark.usefixtures("unchecked")
def test_dtypes_by_any_name(value):
    assert create_model("scnet50", dtype=value, num_classes=np.int64(3)).dtype == value


@pytest.mark.parametrize("name", [3, None, ["scnet50"], "SCNet-50"])
@pytest.mark.usefixtures("unchecked")
def test_unknown_names(name):
    with pytest.raises(ValueError, match=rf"There is no model {re.escape(repr(name))}.* All: densenet121_small"):
        model_info(name)


def test_public_names():
    for name in ("create_model", "list_models", "model_info", "feature_info"):
        assert getattr(models, name) is getattr(scconv_jax, name)
    assert set(models.__all__) >= {"ModelSpec", "ResNet", "SCNet", "WideResNet", "DenseNet", "GhostNet", "Bottleneck"}
