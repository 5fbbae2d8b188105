"""Options of every network: no head, pooled features, dropout, stochastic depth, frozen stages, rematerialisation, parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from scconv_jax import create_model, model_info
from scconv_jax.models import BasicBlock, Bottleneck, DenseNet, GhostNet, ResNet, SCBottleneck, SCNet, WideResNet

pytestmark = pytest.mark.usefixtures("unchecked", "short_ghostnet")
SMALL = {"num_classes": 3, "output_stride": 8, "planes": (4, 8)}
X = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
FAMILIES = {
    "ResNet": (ResNet(Bottleneck, (1, 2), **SMALL), 32),
    "SCNet": (SCNet(SCBottleneck, (1, 2), **SMALL), 32),
    "WideResNet": (WideResNet(depth=10, width=1, num_classes=3), 64),
    "DenseNet": (DenseNet(block_sizes=(1, 2), growth=4, num_classes=3), 14),
    "GhostNet": (GhostNet(num_classes=3), 1280),
}
DROPS = ["ResNet", "SCNet", "WideResNet"]


def initial(model):
    """Variables from a seed, without initial values that hide mistakes."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), X, train=False))
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([0.1 + 0.2 * jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_head_and_pooled_features(family):
    model, features = FAMILIES[family]
    variables = initial(model)
    bare = model.clone(num_classes=0)
    expected = {**variables, "params": {name: leaf for name, leaf in variables["params"].items() if name != model.head}}
    shapes = jax.eval_shape(lambda: bare.init(jax.random.key(0), X, train=False))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)
    assert model.num_features == features

    @jax.jit
    def both(variables):
        pooled = model.apply(variables, X, train=False, method="pooled")
        return pooled, model.apply(variables, X, train=False), bare.apply(expected, X, train=False)

    pooled, logits, headless = both(variables)
    assert pooled.shape == (4, features)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(headless, pooled, rtol=1e-5)
    head = variables["params"][model.head]
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"][None], rtol=1e-5, atol=1e-4)


def test_the_record_names_the_head_of_each_family():
    names = ("scnet50", "wrn28_10_small", "densenet121_small", "ghostnet_100", "scconv_resnet50", "ghost_resnet56_small")
    assert [model_info(name).classifier for name in names] == ["fc", "fc", "linear", "classifier", "fc", "fc"]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_cover_every_parameter_once(family):
    model, _ = FAMILIES[family]
    stages = model.stages()
    assert list(stages) == ["stem", *model.feature_info(), "head"]
    paths = list(flatten_dict(jax.eval_shape(lambda: model.init(jax.random.key(0), X, train=False))["params"], sep="/"))
    for path in paths:
        found = [stage for stage, modules in stages.items() if any(path.startswith(f"{module}/") for module in modules)]
        assert len(found) == 1, path


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_norms_keep_their_statistics(family):
    """The stem and the first stage evaluate, the rest trains, and the maps of frozen stages are those of evaluation."""
    model, _ = FAMILIES[family]
    variables, frozen = initial(model), model.clone(frozen=("stem", "layer1"))

    @jax.jit
    def maps(variables):
        new = frozen.apply(variables, X, train=True, mutable=["batch_stats"])[1]["batch_stats"]
        trained = frozen.apply(variables, X, train=True, mutable=["batch_stats"], method="features")[0]
        return new, trained["layer1"], model.apply(variables, X, train=False, method="features")["layer1"]

    new, trained, evaluated = maps(variables)
    np.testing.assert_allclose(trained, evaluated, rtol=1e-4, atol=1e-5 * np.abs(evaluated).max())
    kept = [path for stage in ("stem", "layer1") for path in model.stages()[stage]]
    before = flatten_dict(variables["batch_stats"], sep="/")
    for path, value in flatten_dict(new, sep="/").items():
        assert (value == before[path]).all() == any(path.startswith(f"{module}/") for module in kept), path


def test_patterns_freeze_single_norms():
    model, _ = FAMILIES["ResNet"]
    variables = initial(model)
    new = model.clone(frozen=("layer2/0", "*/bn3")).apply(variables, X, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    before = flatten_dict(variables["batch_stats"], sep="/")
    same = {path.rpartition("/")[0] for path, value in flatten_dict(new, sep="/").items() if (value == before[path]).all()}
    assert same == {path.rpartition("/")[0] for path in before if path.startswith("layer2/0/") or "/bn3/" in path}


@pytest.mark.parametrize("family", DROPS)
def test_stochastic_depth(family):
    """Per image, in training alone, and without an effect on the first block, whose rate is 0."""
    model, _ = FAMILIES[family]
    variables, random = initial(model), model.clone(drop_path=0.5)

    @jax.jit
    def maps(variables, key):
        return random.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": key}, method="features")[0]

    found = [maps(variables, jax.random.key(seed)) for seed in (0, 0, 1, 2, 3)]
    first, *_, last = found[0]
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
    for other in found[2:]:
        np.testing.assert_array_equal(found[0][first], other[first])
    assert any((found[0][last] != other[last]).any() for other in found[2:])
    np.testing.assert_array_equal(random.apply(variables, X, train=False), model.apply(variables, X, train=False))
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        random.apply(variables, X, train=True, mutable=["batch_stats"])


def test_a_dropped_branch_is_zero_and_the_others_are_scaled():
    block = BasicBlock(4, drop_path=0.25)
    x = jnp.abs(jax.random.normal(jax.random.key(2), (64, 4, 4, 4)))
    variables = block.init(jax.random.key(0), x, train=False)
    whole, _ = block.clone(drop_path=0.0).apply(variables, x, train=True, mutable=["batch_stats"])
    some, _ = block.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})
    dropped = (some == x).all((1, 2, 3))
    assert 4 <= dropped.sum() <= 32
    before = jnp.where(whole > 0, whole - x, 0)  # the branch, where ReLU passes
    passed = (whole > 0) & (some > 0) & ~dropped[:, None, None, None]
    np.testing.assert_allclose(jnp.where(passed, some - x, 0), jnp.where(passed, before / 0.75, 0), atol=1e-5)


def test_dropout_before_the_head():
    model, _ = FAMILIES["ResNet"]
    variables, random = initial(model), model.clone(dropout=0.5)
    assert jax.tree.map(jnp.shape, initial(random)) == jax.tree.map(jnp.shape, variables)

    def train(model, key, **options):
        return model.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(key)}, **options)[0]

    assert (train(random, 0) != train(random, 1)).any()
    np.testing.assert_array_equal(train(random, 0, method="pooled"), train(model, 0, method="pooled"))
    np.testing.assert_array_equal(random.apply(variables, X, train=False), model.apply(variables, X, train=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("x64")
def test_rematerialisation_changes_memory_and_not_the_gradient(family):
    model = FAMILIES[family][0].clone(dtype=jnp.float64)
    variables, images = initial(model), X.astype(jnp.float64)

    def loss(params, model):
        y, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.square(y).mean(), new

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    plain, small = (gradient.trace(variables["params"], m) for m in (model, model.clone(rematerialise=True)))
    assert ["checkpoint" in str(t.jaxpr) or "remat" in str(t.jaxpr) for t in (plain, small)] == [False, True]
    if family == "ResNet":
        leaves = [jax.tree.leaves(t.lower().compile()(variables["params"])) for t in (plain, small)]
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_parameters_of_another_dtype_and_with_other_initial_values():
    model = create_model("scnet20_small", param_dtype=jnp.bfloat16, kernel_init=nn.initializers.constant(0.5))
    variables = jax.jit(lambda: model.init(jax.random.key(0), X, train=False))()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["batch_stats"])} == {"float32"}
    kernels = {path: leaf for path, leaf in flatten_dict(variables["params"], sep="/").items() if path.endswith("kernel")}
    assert "fc/kernel" in kernels
    assert all((leaf == 0.5).all() for leaf in kernels.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"drop_path": 1.0},
            "drop_path=1.0 must be a probability from 0 to below 1; 0 switches it off. Nearest valid value: 0.99.",
        ),
        ({"drop_path": 20}, "Nearest valid value: 0.99, or 0.2 if it is in percent."),
        ({"dropout": -0.5}, "dropout=-0.5 must be a probability from 0 to below 1; 0 switches it off. Nearest valid value: 0."),
        ({"dropout": "half"}, "dropout='half' must be a probability from 0 to below 1"),
        ({"dropout": True}, "dropout=True must be a probability"),
        ({"dropout": float("nan")}, "dropout=nan must be a probability"),
        ({"frozen": "stem"}, "frozen='stem' must be a tuple of names, such as ('stem', 'layer1')."),
        ({"frozen": 3}, "frozen=3 must be a tuple of names"),
        ({"frozen": ("layr1",)}, "the network has no stage or module 'layr1'. Did you mean 'layer1' or"),
        ({"frozen": ("layer5",)}, "Stages: stem, layer1, layer2, layer3, layer4, head; patterns of paths, such as layer1/0"),
        ({"rematerialise": "yes"}, "rematerialise='yes' must be True or False."),
        ({"param_dtype": jnp.int8}, "is not a floating-point dtype. Use jnp.float32"),
        ({"kernel_init": 0.1}, "kernel_init=0.1 must be a function (key, shape, dtype) → array"),
        ({"kernel_init": nn.initializers.he_normal}, "kernel_init=he_normal must be a function (key, shape, dtype) → array"),
        ({"kernel_init": nn.initializers.he_normal}, "It returns a function: give he_normal()."),
        ({"kernel_init": lambda *, shape: shape}, "Called so, it fails: too many positional arguments."),
        ({"in_channels": 0}, "in_channels=0 must be one positive integer. Nearest valid value: 1."),
        ({"num_classes": 2.5}, "num_classes=2.5 must be 0, for no head, or a positive integer. Nearest valid value: 2 or 3."),
        ({"axis_name": ["batch"]}, "axis_name=['batch'] must be the name of a mapped axis, or a tuple of names. Use ('batch',)."),
        ({"dtype": "bf16"}, "dtype='bf16' is not a floating-point dtype. Did you mean 'bfloat16'?"),
        (
            {"planes": (8, 8, 8, 0.5)},
            "the width of each of the 4 stages, each a positive integer; got 0.5. Nearest valid value: 1.",
        ),
        ({"planes": "abcd"}, "planes='abcd' must be a tuple with the width of each of the 4 stages."),
        ({"frozen": ("layer1/9",)}, "the network has no stage or module 'layer1/9'."),
        ({"frozen": ("*/bn1_c",)}, "the network has no stage or module '*/bn1_c'. Did you mean"),
        ({"alpha": 0.5}, "no option 'alpha'. Networks that have it: scconv_resnet50, scconv_"),
        ({"layers": (3, 4)}, "no option 'layers'. A network by name has a fixed structure"),
        ({"pooling": "avg"}, "no option 'pooling'. The head averages the last map; method=\"pooled\" returns the average."),
    ],
)
def test_values_that_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("scnet50", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WideResNet(depth=27), "depth=27 must be 6 k + 4, an integer from 10 on. Nearest valid value: 28."),
        (lambda: WideResNet(depth="28"), "depth='28' must be 6 k + 4"),
        (lambda: WideResNet(width=1.5), "width=1.5 must be one positive integer. Nearest valid value: 1 or 2."),
        (lambda: DenseNet(block_sizes=()), "block_sizes=() must be a tuple with the number of layers of each block."),
        (lambda: DenseNet(growth=0), "growth=0 must be one positive integer. Nearest valid value: 1."),
        (lambda: ResNet(Bottleneck, (2, 0)), "the number of blocks of each stage, each a positive integer; got 0."),
        (lambda: ResNet("bottleneck", (2, 2), (8, 8), output_stride=8), "block='bottleneck' must be the class of a module"),
        (lambda: ResNet(Bottleneck, (2,), (8,), stem_stride=0), "stem_stride=0 must be one positive integer."),
        (lambda: Bottleneck(8, drop_path=1), "drop_path=1 must be a probability from 0 to below 1"),
        (lambda: Bottleneck(8, norm="batch"), "norm='batch' must be the class of a module, such as scconv_jax.layers.BatchNorm"),
        (lambda: SCBottleneck(1).init(jax.random.key(0), X, train=False), "planes=1 leave no channels for the branches"),
    ],
)
def test_parts_of_networks_check_their_values(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_no_weights_may_be_asked_for():
    assert create_model("scnet50", pretrained=False, weights=None) == create_model("scnet50")
