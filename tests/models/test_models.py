"""The networks by name: exact sizes, initial values, what they accept, and what they say to what they do not."""

import functools
import math
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from scconv_jax import create_model, list_models
from scconv_jax.models.complexity import multiply_adds

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")

# Parameters, and multiply-adds at 224 px in 10⁹ where published (Liu et al., CVPR 2020, Tables 1-3, and
# https://github.com/MCG-NKU/SCNet). Counts of parameters are those of the PyTorch oracles, which for the published
# checkpoints are also those of the files.
SIZES = {
    "resnet50": (25_557_032, 4.1),
    "resnet101": (44_549_160, 7.8),
    "scnet50": (25_564_584, 4.0),
    "scnet101": (44_565_416, 7.2),
    "scnet50_v1d": (25_583_816, 4.7),
    "scnet101_v1d": (44_689_192, None),
    "scnext50": (25_044_008, 4.3),
    "scnext101": (44_210_216, 8.0),
    "se_scnet50": (28_095_576, 4.0),
    "se_scnet101": (49_343_128, 7.2),
    "resnet20_small": (220_378, None),
    "scnet20_small": (220_826, None),
    # The comparisons of Li, Wen, He, CVPR 2023, whose multiply-adds are compared where the tables are printed.
    "scconv_resnet50": (16_530_280, None),
    "scconv_resnet101": (27_527_784, None),
    "scconv_resnet20_small": (143_770, None),
    "resnet50_small": (23_520_842, None),
    "scconv_resnet50_small": (14_494_090, None),
    "resnet56_small": (855_770, None),
    "scconv_resnet56_small": (511_034, None),
    "resnext29_small": (27_106_122, None),
    "scconv_resnext29_small": (25_315_914, None),
    "wrn28_10_small": (36_479_194, None),
    "scconv_wrn28_10_small": (21_036_634, None),
    "densenet121_small": (6_956_298, None),
    "scconv_densenet121_small": (5_399_114, None),
    "ghost_resnet50": (15_320_680, None),
    "ghost_resnet56_small": (440_906, None),
    "ghostnet_100": (5_182_508, None),
    "ghostnet_100_pytorchcv": (5_180_840, None),  # asserted in its own code
}
# The networks with the trunk of ResNet-50 and -101, and of its small sister: (size of images / size of map, channels).
TRUNKS = {
    4: [(4, 256), (8, 512), (16, 1024), (32, 2048)],
    3: [(1, 64), (2, 128), (4, 256)],
}


# Random numbers for many kernels take LLVM half a minute to optimise.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def shapes_of(name: str, size: tuple[int, int] = (128, 128)):
    """Logits, maps and variables of the bfloat16 network, as shapes: nothing is allocated, and it is traced once."""
    model = create_model(name, dtype=jnp.bfloat16)

    def everything(model, images):
        return model(images, train=False), model.features(images, train=False)

    init = nn.init_with_output(everything, model)
    (logits, maps), variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, *size, 3)))
    return logits, maps, variables


def test_the_table_has_no_gaps():
    assert list_models() == sorted(list_models())
    assert set(SIZES) == set(list_models())


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name):
    _, _, variables = shapes_of(name)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == SIZES[name][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}, "whatever is computed in"


@pytest.mark.parametrize("name", [name for name, (_, published) in SIZES.items() if published])
def test_multiply_adds(name):
    published = SIZES[name][1]
    assert multiply_adds(create_model(name)) / 1e9 == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", SIZES)
def test_logits_and_features(name):
    logits, maps, _ = shapes_of(name)
    assert (logits.shape, logits.dtype) == ((2, 10 if name.endswith("_small") else 1000), jnp.float32)
    assert {value.dtype for value in maps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert list(maps) == [f"layer{i + 1}" for i in range(len(maps))]
    if name.endswith(("net50", "net101", "next50", "next101", "v1d", "20_small")):
        expected = [(2, 128 // stride, 128 // stride, channels) for stride, channels in TRUNKS[len(maps)]]
        assert [value.shape for value in maps.values()] == expected


@pytest.mark.parametrize(("output_stride", "sizes"), [(32, [28, 14, 7]), (16, [28, 14, 14]), (8, [28, 28, 28])])
def test_output_stride(output_stride, sizes):
    model = create_model("scnet50", output_stride=output_stride)
    apply = partial(model.apply, train=False, method="features")
    maps = jax.eval_shape(apply, shapes_of("scnet50")[2], jnp.zeros((1, 224, 224, 3)))
    assert [value.shape[1] for value in maps.values()] == [56, *sizes]


@pytest.mark.parametrize("num_classes", [1, 37])
def test_num_classes(num_classes):
    model = create_model("scnet20_small", num_classes=num_classes)
    init = partial(model.init_with_output, train=False)
    logits, variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
    assert logits.shape == (2, num_classes)
    assert variables["params"]["fc"]["kernel"].shape == (256, num_classes)


def test_initial_values():
    """He's normal distribution by fan-out for convolutions, PyTorch's uniform one for the last layer, BatchNorm at rest."""
    model = create_model("scnet50").clone(stage_sizes=(1, 1, 1, 1))
    variables = quick_jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, 97, 97, 3)))
    for path, value in jax.tree_util.tree_flatten_with_path(variables)[0]:
        kind = path[-1].key
        where = jax.tree_util.keystr(path)
        if kind in ("scale", "var"):
            np.testing.assert_array_equal(value, 1, err_msg=where)
        elif kind == "mean" or (kind == "bias" and value.shape != (1000,)):
            np.testing.assert_array_equal(value, 0, err_msg=where)
        elif value.ndim == 4:
            expected = math.sqrt(2 / (value.shape[0] * value.shape[1] * value.shape[3]))
            # The standard error of a standard deviation of n values is 1 / sqrt(2 n) of it; five of those.
            assert np.std(value) == pytest.approx(expected, rel=5 / math.sqrt(2 * value.size)), where
            assert np.abs(np.mean(value)) < 5 * expected / math.sqrt(value.size), where
            if value.size > 20_000:
                assert np.abs(value).max() > 3.2 * expected, f"{where}: truncated"
        else:
            bound = 1 / math.sqrt(2048)
            assert bound * 0.98 < np.abs(value).max() <= bound, where


def test_statistics_over_devices_are_those_of_the_whole_batch():
    """`axis_name` makes four devices with two images each one batch of eight."""
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    local, whole = create_model("scnet20_small", axis_name="devices"), create_model("scnet20_small")
    variables = quick_jit(partial(whole.init, train=False))(jax.random.key(0), images)
    expected, expected_stats = jax.jit(partial(whole.apply, train=True, mutable=["batch_stats"]))(variables, images)

    def step(images):
        return local.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, stats = jax.jit(jax.vmap(step, axis_name="devices"))(images.reshape(4, 2, 16, 16, 3))
    np.testing.assert_allclose(logits.reshape(8, -1), expected, atol=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, atol=2e-5, rtol=2e-4), stats, expected_stats)


def smallest_sizes():
    for name in list_models():
        if name == "scnet20_small":
            yield name, 4, 13
        elif name.startswith(("scnet", "scnext", "se_scnet")):
            yield from ((name, stride, size) for stride, size in ((32, 97), (16, 49), (8, 25)))


# These sizes themselves are enough: the equivalence tests use them.
@pytest.mark.parametrize(("name", "output_stride", "smallest"), list(smallest_sizes()))
def test_images_too_small(name, output_stride, smallest):
    model = create_model(name, output_stride=output_stride)
    for shape in [(1, smallest - 1, 224, 3), (1, 224, smallest - 1, 3)]:
        with pytest.raises(ValueError, match=rf"at least {smallest}×{smallest}.*got {shape[1]}×{shape[2]}"):
            jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("name", ["scnet50", "resnet20_small"])
@pytest.mark.usefixtures("unchecked")
def test_images_of_another_kind(name):
    init = partial(create_model(name).init, train=False)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"float.*uint8"):
        jax.eval_shape(init, key, jnp.zeros((1, 128, 128, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"\(n, h, w, 3\).*\(1, 3, 128, 128\).*transpose\(0, 2, 3, 1\)"):
        jax.eval_shape(init, key, jnp.zeros((1, 3, 128, 128)))
    with pytest.raises(ValueError, match=r"\(n, h, w, 3\).*\(1, 128, 128, 1\)"):
        jax.eval_shape(init, key, jnp.zeros((1, 128, 128, 1)))
    with pytest.raises(ValueError, match=r"\(n, h, w, 3\).*\(128, 128, 3\)"):
        jax.eval_shape(init, key, jnp.zeros((128, 128, 3)))


@pytest.mark.parametrize("name", list_models())
def test_networks_made_alike_are_equal_and_can_be_pickled(name):
    """Equal and hashed alike: a function jitted for the one is not compiled again for the other."""
    model = create_model(name, num_classes=7)
    assert model == create_model(name, num_classes=7)
    assert hash(model) == hash(create_model(name, num_classes=7))
    assert model != create_model(name, num_classes=8)
    assert repr(pickle.loads(pickle.dumps(model))) == repr(model)


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("scconv_")])
def test_options_of_the_operator_are_checked_where_the_network_is_made(name):
    with pytest.raises(ValueError, match=r"alpha=1\.5 must be between 0 and 1, both excluded"):
        create_model(name, alpha=1.5)
    with pytest.raises(ValueError, match=r"Unknown variant 'papr'. Did you mean 'paper'"):
        create_model(name, variant="papr")
    assert create_model(name, alpha=0.75) != create_model(name)


@pytest.mark.parametrize("name", ["scconv_resnet50", "resnet50"])
def test_images_of_one_pixel(name):
    logits = jax.eval_shape(
        partial(create_model(name).init_with_output, train=False), jax.random.key(0), jnp.zeros((1, 1, 1, 3))
    )[0]
    assert logits.shape == (1, 1000)


def test_train_has_no_default():
    model = create_model("scnet20_small")
    with pytest.raises(TypeError, match="train"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize(
    ("name", "nearest"), [("scnet_50", "scnet50"), ("SCNet50", "scnet50"), ("resnet20-small", "resnet20_small")]
)
def test_unknown_model(name, nearest):
    with pytest.raises(ValueError, match=f"{name!r}.*{nearest!r}"):
        create_model(name)


def test_unknown_option():
    with pytest.raises(ValueError, match=r"'num_clases'.*'num_classes'"):
        create_model("scnet50", num_clases=10)


@pytest.mark.parametrize(("name", "output_stride"), [("scnet50", 4), ("scnet50", 12), ("scnet20_small", 32)])
def test_output_stride_that_cannot_be_had(name, output_stride):
    def init(images):
        return create_model(name, output_stride=output_stride).init(jax.random.key(0), images, train=False)

    with pytest.raises(ValueError, match=rf"output_stride={output_stride}"):
        jax.eval_shape(init, jnp.zeros((1, 97, 97, 3)))
