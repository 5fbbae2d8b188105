"""`fuse`: equal outputs from fewer and larger operations."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax.functional import conv
from scconv_jax.fusion.fuse import is_fused
from scconv_jax.fusion.winograd import plain_kernel, winograd_conv, winograd_kernel, winograd_product
from scconv_jax.layers import ARRANGEMENTS, VARIANTS, BatchNorm, Conv, ConvNorm, Dense, SelfCalibratedConv
from scconv_jax.models import ResNet


def random_variables(model, images, dtype=np.float32):
    """Returns variables whose BatchNorm has random state: a fresh one hides errors."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
        spread = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return (spread * rng.normal(size=leaf.shape)).astype(dtype)

    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    return jax.tree.map_with_path(draw, shapes)


def maps(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def assert_equal_fused(model, images, tolerance, dtype=np.float64, method="features"):
    """Fuses a network of random variables and compares all its maps. Returns the fused network and its variables."""
    variables = random_variables(model, images, dtype)
    fused, new = scconv_jax.fuse(model, variables)
    run = jax.jit(lambda m, v, x: m.apply(v, x, train=False, method=method), static_argnums=0)
    expected, found = run(model, variables, images), run(fused, new, images)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max()
    return fused, new


SMALL = {
    "scnet20_small": {},
    "resnet20_small": {},
    "scconv_resnet20_small": {"alpha": 0.75},
    "ghost_resnet56_small": {"planes": (16, 32, 64)},
    "wrn28_10_small": {"depth": 10, "width": 2},
    "scconv_wrn28_10_small": {"depth": 10, "width": 2},
    "densenet121_small": {"block_sizes": (2, 2)},
    "scconv_densenet121_small": {"block_sizes": (2, 2)},
    "resnext29_small": {"planes": (64, 64, 64)},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_are_equal_in_float64(name):
    model = scconv_jax.create_model(name, dtype=jnp.float64, num_classes=7, **SMALL[name])
    if hasattr(model, "stage_sizes"):
        model = model.clone(stage_sizes=(1,) * len(model.stage_sizes))
    fused, new = assert_equal_fused(model, maps(2, 21, 19, 3, dtype=np.float64), 1e-10)
    assert set(new) == {"params"}
    assert is_fused(new)
    assert isinstance(fused, type(model))
    assert fused.feature_info() == model.feature_info()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "stride"),
    [("scnet50", 32), ("scnet50", 8), ("scnet50_v1d", 16), ("scnext50", 32), ("se_scnet50", 32), ("scconv_resnet50", 32)],
)
def test_networks_for_imagenet_are_equal_in_float64(name, stride):
    model = scconv_jax.create_model(name, dtype=jnp.float64, planes=(32, 32, 64, 64), output_stride=stride, num_classes=5)
    model = model.clone(stage_sizes=(1, 2, 1, 1))
    assert_equal_fused(model, maps(1, 101, 97, 3, dtype=np.float64), 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_ghostnet_is_equal_in_float64():
    assert_equal_fused(scconv_jax.create_model("ghostnet_100", dtype=jnp.float64), maps(1, 37, 45, 3, dtype=np.float64), 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("variant", "arrangement"),
    [("paper", name) for name in ARRANGEMENTS] + [(name, "S+C") for name in VARIANTS if name != "paper"],
)
def test_every_variant_and_arrangement_of_scconv_is_equal(variant, arrangement):
    groups = 4 if variant == "paper" else 2
    layer = scconv_jax.ScConv(
        24, variant=variant, arrangement=arrangement, strides=2, groups=4, conv_groups=groups, dtype=jnp.float64
    )
    assert_equal_fused(layer, maps(2, 9, 7, 16, dtype=np.float64), 1e-10, method="__call__")


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
def test_each_dtype_stays_within_its_rounding(dtype, tolerance):
    # bfloat16 has 8 bits, float16 11: a few roundings of 2^-9 and 2^-12 through nine layers.
    model = scconv_jax.create_model("scnet20_small", dtype=dtype).clone(stage_sizes=(1, 1, 1), planes=(64, 64, 64))
    _, new = assert_equal_fused(model, maps(2, 29, 31, 3), tolerance, np.float32, "__call__")
    leaves = {path[-1].key for path, _ in jax.tree.leaves_with_path(new)}
    assert ("winograd" in leaves) == (dtype == jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {np.dtype(np.float32)}


class Mine(nn.Module):
    """A network of a user: pairs that fold, and pairs that must not."""

    dtype: object = None

    @nn.compact
    def __call__(self, x, *, train):
        """Return logits."""
        y = Conv(16, 3, padding=1, use_bias=True, dtype=self.dtype)(x)
        y = nn.relu(BatchNorm()(y, train=train))
        raw = Conv(16, 1)(y)
        y = BatchNorm()(raw, train=train) + raw  # the sum reads the convolution's output as well
        y = SelfCalibratedConv(16, name="calibrated")(nn.relu(y), train=train)
        shared, norm = ConvNorm(16, name="shared"), BatchNorm(name="twice")
        y = norm(shared(shared(y, train=train), train=train), train=train)
        y = norm(nn.relu(y), train=train)
        y = Conv(16, 3, padding=1, groups=16)(y)
        y = BatchNorm(epsilon=1e-3)(y, train=train).mean(axis=(1, 2))
        y = BatchNorm()(Dense(12)(y), train=train)
        return Dense(5, name="fc")(y)


@pytest.mark.usefixtures("x64")
def test_a_network_of_a_user_folds_only_what_is_exact():
    x = maps(2, 13, 11, 3, dtype=np.float64)
    _, new = assert_equal_fused(Mine(), x, 1e-10, method="__call__")
    params = new["params"]
    assert "BatchNorm_0" not in params
    assert set(params["Conv_0"]) == {"kernel", "offset"}
    assert set(params["BatchNorm_1"]) == {"factor", "offset"}
    assert set(params["Conv_1"]) == {"kernel"}
    assert set(params["shared"]) == {"0"}
    assert set(params["twice"]) == {"factor", "offset"}
    assert "BatchNorm_2" not in params
    assert "BatchNorm_3" not in params
    assert set(params["Dense_0"]) == {"kernel", "offset"}
    assert "fc" in params


def test_a_fused_network_inside_another_module_and_outside_of_this_process():
    model = ResNet(functools.partial(scconv_jax.models.Bottleneck), (1, 1), planes=(32, 32), num_classes=4, output_stride=8)
    x = maps(2, 40, 40, 3)
    variables = random_variables(model, x)
    fused, new = scconv_jax.fuse(model, variables)

    class Outer(nn.Module):
        backbone: nn.Module

        def __call__(self, x):
            return self.backbone.features(x, train=False)["layer2"]

    expected = fused.apply(new, x, train=False, method="features")["layer2"]
    found = Outer(fused).apply({"params": {"backbone": new["params"]}}, x)
    np.testing.assert_array_equal(found, expected)
    again = pickle.loads(pickle.dumps(fused))
    assert type(again) is type(fused)
    np.testing.assert_array_equal(again.apply(new, x, train=False, method="features")["layer2"], expected)
    shapes = jax.eval_shape(functools.partial(fused.init, train=False), jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), new)


def test_a_fused_network_exports_with_symbolic_sizes():
    model = scconv_jax.create_model("scnet20_small").clone(stage_sizes=(1, 1, 1), planes=(64, 64, 64))
    x = maps(2, 32, 48, 3)
    fused, new = scconv_jax.fuse(model, random_variables(model, x))
    shape = jax.export.symbolic_shape("n, 16*h, 16*w, 3", constraints=["h >= 1", "w >= 1"])
    run = jax.jit(functools.partial(fused.apply, train=False))
    for symbolic in (shape, ("n", 32, 48, 3)):
        if symbolic is not shape:
            symbolic = jax.export.symbolic_shape("n, 32, 48, 3")
        exported = jax.export.export(run, platforms=("cpu", "tpu"))(new, jax.ShapeDtypeStruct(symbolic, jnp.float32))
        found = jax.export.deserialize(exported.serialize()).call(new, x)
        np.testing.assert_allclose(found, run(new, x), atol=2e-5)


def test_accelerators_keep_plain_kernels():
    model = scconv_jax.create_model("scnet20_small").clone(stage_sizes=(1, 1, 1), planes=(64, 64, 64))
    _, new = scconv_jax.fuse(model, random_variables(model, maps(1, 32, 32, 3)), platform="gpu")
    assert not any("winograd" in str(path) for path, _ in jax.tree.leaves_with_path(new))


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (7, 14), (30, 29)])
@pytest.mark.usefixtures("x64")
def test_winograd_is_exact_for_any_size(size):
    x, kernel = maps(2, *size, 6, dtype=np.float64), np.asarray(maps(3, 3, 6, 5, dtype=np.float64))
    transformed = jnp.asarray(winograd_kernel(kernel))
    np.testing.assert_allclose(winograd_conv(x, transformed), conv(x, jnp.asarray(kernel), padding=1), atol=1e-12)
    np.testing.assert_allclose(plain_kernel(transformed), kernel, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_winograd_rounds_within_float32():
    x, kernel = maps(2, 28, 28, 64), np.asarray(maps(3, 3, 64, 64)) / np.float32(24)
    found = winograd_conv(x, jnp.asarray(winograd_kernel(kernel)))
    expected = conv(jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64), padding=1)
    assert np.abs(found - expected).max() < 1e-5  # outputs of standard deviation 1; a direct convolution: 2e-6


def test_a_stored_kernel_is_in_the_order_of_the_matmuls():
    """Another order would be a copy of all kernels in each run."""
    kernel, x = jnp.ones((6, 6, 8, 16)), jnp.ones((1, 8, 8, 8))
    program = jax.make_jaxpr(winograd_product)(kernel, x).jaxpr
    assert [eqn.primitive.name for eqn in program.eqns if program.invars[0] in eqn.invars] == ["reshape"]
