"""The 2023 operator without PyTorch: its properties, its sizes, what it refuses."""

import re

import flax.nnx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax import CRU, SRU, ScConv
from scconv_jax import functional as F
from scconv_jax.functional.convolution import reconstruction_kernel
from scconv_jax.layers.variants import ARRANGEMENTS, VARIANTS
from scconv_jax.models.blocks import Bottleneck

KEY = jax.random.key(0)
few = hypothesis.settings(max_examples=6, deadline=None, derandomize=True)


def images(n=2, h=5, w=6, c=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, h, w, c))


def randomised(layer, x, seed=1):
    """Variables with nothing left at the value that it is born with; scales stay positive, for their sum not to vanish."""
    variables = layer.init(jax.random.key(seed), x)
    leaves, structure = jax.tree.flatten_with_path(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        scale = path[-1].key in ("scale", "gamma")
        drawn = jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5) if scale else 0.3 * jax.random.normal(key, leaf.shape)
        values.append(drawn)
    return jax.tree.unflatten(structure, values)


@pytest.mark.parametrize("variant", VARIANTS)
@few
@hypothesis.given(seed=st.integers(0, 99), alpha=st.sampled_from([0.25, 0.5, 0.75]))
def test_s_then_c_is_the_composition_of_the_units(variant, seed, alpha):
    x = images(seed=seed)
    layer = ScConv(variant=variant, groups=4, alpha=alpha)
    params = randomised(layer, x, seed)["params"]
    s = SRU(variant=variant, groups=4).apply({"params": params["SRU"]}, x)
    c = CRU(variant=variant, alpha=alpha).apply({"params": params["CRU"]}, s)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), c)


@pytest.mark.parametrize("arrangement", ["C+S", "S&C", "S", "C"])
def test_other_arrangements_are_made_of_the_same_units(arrangement):
    x = images()
    layer = ScConv(arrangement=arrangement)
    params = randomised(layer, x)["params"]

    def s(x):
        return SRU().apply({"params": params["SRU"]}, x)

    def c(x):
        return CRU().apply({"params": params["CRU"]}, x)

    expected = {"C+S": lambda: s(c(x)), "S&C": lambda: s(x) + c(x), "S": lambda: s(x), "C": lambda: c(x)}[arrangement]()
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-6, atol=1e-6)
    assert set(params) == {unit for unit, letter in (("SRU", "S"), ("CRU", "C")) if letter in arrangement}


@few
@hypothesis.given(
    groups=st.sampled_from([1, 2, 4]), size=st.sampled_from([1, 3, 5]), dilation=st.sampled_from([1, 2]), seed=st.integers(0, 99)
)
def test_the_dense_kernel_equals_the_group_wise_and_the_point_wise_one(groups, size, dilation, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (2, 6, 7, 8))
    gwc, pwc1 = jax.random.normal(keys[1], (size, size, 8 // groups, 12)), jax.random.normal(keys[2], (1, 1, 8, 12))
    options = {"padding": dilation * (size // 2), "dilation": dilation}
    plain = jax.lax.conv_general_dilated(
        x,
        gwc,
        (1, 1),
        [(options["padding"],) * 2] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    ) + F.conv(x, pwc1)
    dense = F.conv(x, reconstruction_kernel(gwc, pwc1, groups), **options)
    np.testing.assert_allclose(dense, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("channels", "conv_groups"), [(16, 2), (128, 2), (128, 4)])
def test_every_form_of_the_group_wise_convolution_gives_the_same(channels, conv_groups):
    """On CPU 16 channels take the dense form; 128, in two groups or four, separate convolutions."""
    x = images(c=channels, h=4, w=4)
    layer = CRU(conv_groups=conv_groups)
    params = randomised(layer, x)["params"]
    upper = F.conv(x[..., : channels // 2], params["squeeze1"]["kernel"])
    lower = F.conv(x[..., channels // 2 :], params["squeeze2"]["kernel"])
    numbers = ("NHWC", "HWIO", "NHWC")
    y1 = jax.lax.conv_general_dilated(
        upper,
        params["GWC"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=numbers,
        feature_group_count=conv_groups,
    )
    y1 = y1 + params["GWC"]["bias"].reshape(1, 1, 1, -1) + F.conv(upper, params["PWC1"]["kernel"])
    y2 = jnp.concatenate([F.conv(lower, params["PWC2"]["kernel"]), lower], axis=-1)
    b1, b2 = jax.nn.softmax(jnp.stack([y1.mean((1, 2)), y2.mean((1, 2))]), axis=0)
    expected = b1[:, None, None] * y1 + b2[:, None, None] * y2
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "on_cpu", "on_cuda"), [(128, 2, 1), (32, 1, 1)])
def test_accelerators_take_the_dense_form(channels, on_cpu, on_cuda):
    """With 128 channels, two convolutions and a matmul are faster on CPU (`benchmarks/results/operators.md`)."""
    x = images(c=channels, h=4, w=4)
    layer = CRU()
    trace = jax.jit(layer.apply).trace(randomised(layer, x), x)
    for platform, expected in (("cpu", on_cpu), ("cuda", on_cuda + 3)):  # for cuda, the 1×1 are convolutions too
        found = trace.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution(")
        assert found == expected, platform


@pytest.mark.parametrize("variant", VARIANTS)
@few
@hypothesis.given(seed=st.integers(0, 99))
def test_images_do_not_see_each_other(variant, seed):
    x = images(n=3, seed=seed)
    layer = ScConv(variant=variant, groups=4)
    variables = randomised(layer, x, seed)
    y = layer.apply(variables, x)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(layer.apply(variables, x[order]), y[order], rtol=1e-5, atol=1e-6)
    padded = jnp.concatenate([x, jnp.zeros_like(x)])
    np.testing.assert_allclose(layer.apply(variables, padded)[:3], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("variant", "shrinks"), [("paper", False), ("2023-07", True), ("2023-09", True), ("2023-10", True)])
def test_scale_of_the_output(variant, shrinks):
    x = images(n=4, h=8, w=8, c=64)
    layer = ScConv(variant=variant)
    spread = layer.apply(layer.init(KEY, x), x).std()
    assert (spread < 0.1) == shrinks


@pytest.mark.parametrize(("variant", "learns"), [("paper", True), ("2023-07", False), ("2023-09", True), ("2023-10", True)])
def test_gradient_of_the_norms_scale(variant, learns):
    x = images()
    layer = ScConv(variant=variant, groups=4)
    variables = randomised(layer, x)
    gradients = jax.grad(lambda v: jnp.square(layer.apply(v, x)).sum())(variables)["params"]["SRU"]["gn"]
    for gradient in jax.tree.leaves(gradients):
        assert bool(jnp.any(gradient != 0)) == learns


@pytest.mark.parametrize("total", [0.0, 1e-12, -1e-12])
def test_a_scale_whose_sum_vanishes_stays_finite_in_the_default(total):
    x = images(c=4)
    layer = SRU(groups=2)
    gamma = jnp.array([1.0, -1.0, 0.5, -0.5 + total])

    def loss(gamma):
        y = layer.apply({"params": {"gn": {"scale": gamma, "bias": jnp.zeros(4)}}}, x)
        return jnp.square(y).sum()

    value, gradient = jax.value_and_grad(loss)(gamma)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_values(variant):
    """GN(X) is β = 0, so W = 0.5 = t: kept as it is where it must exceed t, informative where it need only reach it."""
    x = jnp.ones((1, 4, 4, 8))
    layer = SRU(variant=variant, groups=4)
    variables = layer.init(KEY, x)
    y = layer.apply(variables, x)
    expected = {"paper": 1.0, "2023-07": 1.0, "2023-09": 0.0, "2023-10": 1.0}[variant]
    np.testing.assert_allclose(y, jnp.full_like(x, expected), atol=1e-6)
    gradient = jax.grad(lambda x: layer.apply(variables, x).sum())(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_bfloat16(variant, magnitude):
    x = magnitude * images(h=8, w=8)
    layer = ScConv(variant=variant, groups=4, dtype=jnp.bfloat16)
    variables = layer.init(KEY, x)
    y = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    assert jnp.isfinite(y).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75, 0.875])
@pytest.mark.parametrize("channels", [64, 96])
def test_parameters_are_those_of_equation_11(channels, alpha):
    """Eq. 11, r = 2, g = 2, k = 3, plus the norm's 2 C and the group-wise convolution's bias, C."""
    variables = jax.eval_shape(ScConv(alpha=alpha).init, KEY, images(c=channels))
    up, low = int(alpha * channels), channels - int(alpha * channels)
    equation = up * up // 2 + low * low // 2 + 9 * up // 2 * channels // 2 + up // 2 * channels + low // 2 * (channels - low // 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == equation + 3 * channels
    if alpha == 0.5:
        assert equation == 1.8125 * channels**2


@pytest.mark.parametrize(
    ("strides", "features", "shape"), [(1, 24, (2, 5, 6, 24)), (2, None, (2, 3, 3, 16)), (2, 8, (2, 3, 3, 8))]
)
def test_strides_and_channels(strides, features, shape):
    x = images()
    y, variables = ScConv(features, strides=strides).init_with_output(KEY, x)
    assert y.shape == shape
    assert ("projection" in variables["params"]) == (features is not None)


def test_a_cru_that_widens_by_itself_has_no_projection_and_no_empty_kernel():
    y, variables = ScConv(4, widen="cru").init_with_output(KEY, images())
    assert y.shape == (2, 5, 6, 4)
    assert set(variables["params"]["CRU"]) == {"squeeze1", "squeeze2", "GWC", "PWC1"}, "PWC2 would have no outputs"


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (SRU(), images()),
        (CRU(), images()),
        (ScConv(32, strides=2), images()),
        (ScConv(arrangement="S&C"), images()),
        (scconv_jax.GhostConv(16), images()),
    ],
    ids=["SRU", "CRU", "ScConv", "ScConv S&C", "GhostConv"],
)
def test_nnx(module, x):
    wrapped = flax.nnx.bridge.ToNNX(module, rngs=flax.nnx.Rngs(0)).lazy_init(x)
    y = wrapped(x)
    assert y.shape == module.init_with_output(KEY, x)[0].shape
    gradients = flax.nnx.grad(lambda layer: jnp.square(layer(x)).sum())(wrapped)
    assert len(jax.tree.leaves(gradients)) == len(jax.tree.leaves(module.init(KEY, x)))


def test_pure_functions_under_grad_and_vmap():
    keys = jax.random.split(KEY, 8)
    x = jax.random.normal(keys[0], (3, 2, 4, 4, 8))  # a stack of batches
    weights = {
        "squeeze1": jax.random.normal(keys[1], (1, 1, 4, 2)),
        "squeeze2": jax.random.normal(keys[2], (1, 1, 4, 2)),
        "gwc": jax.random.normal(keys[3], (3, 3, 1, 8)),
        "gwc_bias": jax.random.normal(keys[4], (8,)),
        "pwc1": jax.random.normal(keys[5], (1, 1, 2, 8)),
        "pwc2": jax.random.normal(keys[6], (1, 1, 2, 6)),
    }

    def operator(weights, gamma, x):
        x = F.spatial_reconstruction(x, gamma, jnp.zeros(8), groups=4)
        return F.channel_reconstruction(x, **weights)

    def loss(weights, gamma):
        return jnp.square(jax.vmap(operator, (None, None, 0))(weights, gamma, x)).sum()

    each = jnp.stack([operator(weights, jnp.ones(8), batch) for batch in x])
    np.testing.assert_allclose(jax.vmap(operator, (None, None, 0))(weights, jnp.ones(8), x), each, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(loss, (0, 1))(weights, jnp.ones(8))
    assert all(jnp.any(gradient != 0) for gradient in jax.tree.leaves(gradients))


class Small(nn.Module):
    """A user's own network, whose convolution is handed to it."""

    conv: object

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = Bottleneck(16, conv=self.conv, name="block")(x, train=train)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize("conv", [ScConv, scconv_jax.SelfCalibratedConv], ids=["ScConv", "SelfCalibratedConv"])
def test_an_operator_handed_to_a_block_of_a_users_network(conv):
    x = images(h=8, w=8, c=3)
    variables = Small(conv).init(KEY, x, train=False)
    logits, new = Small(conv).apply(variables, x, train=True, mutable=["batch_stats"])
    assert logits.shape == (2, 3)
    inside = variables["params"]["block"]["conv2"]
    assert set(inside) == ({"SRU", "CRU"} if conv is ScConv else {"scconv", "k1"})
    assert set(new["batch_stats"]["block"]) == {"bn1", "bn2", "bn3", "downsample"} | (
        {"conv2"} - ({"conv2"} if conv is ScConv else set())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "2023-8"}, "Unknown variant '2023-8'. Did you mean '2023-"),
        ({"arrangement": "s+c"}, "Unknown arrangement 's+c'. Did you mean 'S+C'?"),
        ({"arrangement": "C&S"}, "Choose from 'S+C', 'C+S', 'S&C', 'S', 'C'."),
        ({"alpha": 0.0}, "alpha=0 must be between 0 and 1, both excluded: it is the CRU's share of upper channels."),
        ({"alpha": 1.0}, "The nearest value tried in the paper is 7/8."),
        ({"alpha": -0.5}, "The nearest value tried in the paper is 1/8."),
        ({"alpha": "half"}, "alpha='half' must be a number between 0 and 1"),
        ({"strides": 0}, "strides=0 must be one positive integer."),
        ({"strides": (2, 1)}, "strides=(2, 1) must be the same for height and width: use strides=2 or strides=1."),
        ({"strides": (2, 2, 2)}, "strides=(2, 2, 2) must be one positive integer. It applies to both height and width."),
        ({"features": -4}, "features=-4 must be one positive integer."),
        ({"widen": "cruu"}, "Unknown widen 'cruu'. Did you mean 'cru'?"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ScConv(**options)


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        (18, {}, "groups=4 must divide the channels, 18. Nearest valid values: 3 and 6."),
        (16, {"groups": 5}, "groups=5 must divide the channels, 16. Nearest valid values: 4 and "),
        (15, {}, "The channels are split into two halves, but 15 is odd. Use 14 or 16 channels."),
        (
            16,
            {"conv_groups": 3},
            "conv_groups=3 must divide the group-wise convolution's 4 input channels (alpha=0.5 and squeeze=2 of 16 channels)",
        ),
        # 7 and 14 would divide the 42 channels, but not the 48 of the output
        (
            48,
            {"alpha": 0.875, "squeeze": 1, "conv_groups": 8},
            "and its 48 output channels. Nearest valid options: conv_groups=6,",
        ),
        (16, {"kernel_size": 4}, "kernel_size=4 must be odd, so that the kernel has a centre. Use 3 or 5."),
        (16, {"squeeze": 0}, "squeeze=0 must be one positive integer."),
        (16, {"conv_groups": 0}, "conv_groups=0 must be one positive integer."),
        (
            16,
            {"kernel_size": (3, 5)},
            "kernel_size=(3, 5) must be the same for height and width: use kernel_size=3 or kernel_size=5.",
        ),
        (16, {"dilation": -1}, "dilation=-1 must be one positive integer."),
        (16, {"groups": 4.0}, "groups=4.0 must be one positive integer."),
        (
            16,
            {"squeeze": 100},
            "reduce 16 channels to 0 in the upper and 0 in the lower part; each part needs at least one. "
            "Nearest valid options: squeeze=4.",
        ),
        (
            16,
            {"alpha": 0.01},
            "reduce 16 channels to 0 in the upper and 8 in the lower part; each part needs at least one. "
            "Nearest valid options: alpha=0.25.",
        ),
        (4, {}, "conv_groups=2 must divide the group-wise convolution's 1 input channels"),
        (
            2,
            {"groups": 1},
            "reduce 2 channels to 0 in the upper and 0 in the lower part; each part needs at least one. Use more channels.",
        ),
        (
            64,
            {"features": 8, "widen": "cru"},
            "pass 16 of 64 channels straight to the output, which has only 8. Nearest valid options: squeeze=4, or alpha=0.75.",
        ),
        (16, {"gate": "sharp"}, "Unknown gate 'sharp'."),
        (16, {"fuse": "pairs"}, "Unknown fuse 'pairs'. Did you mean 'pair'?"),
        (16, {"gated": "nor"}, "Unknown gated 'nor'. Did you mean 'norm'?"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refused_at_the_first_call(channels, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ScConv(**options).init(KEY, images(c=channels))


@hypothesis.settings(few, max_examples=60)
@hypothesis.given(
    channels=st.integers(1, 50).map(lambda half: 2 * half),
    alpha=st.sampled_from([0.125, 0.5, 0.875]),
    squeeze=st.integers(1, 9),
    conv_groups=st.integers(1, 9),
)
def test_what_an_error_proposes_works(channels, alpha, squeeze, conv_groups):
    options = {"alpha": alpha, "squeeze": squeeze, "conv_groups": conv_groups}
    x = jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32)
    try:
        jax.eval_shape(CRU(**options).init, KEY, x)
    except ValueError as error:
        for name, value in re.findall(r"(\w+)=([\d.]+\d|\d)(?=[,.])", str(error).partition("valid options: ")[2]):
            proposed = {**options, name: float(value) if name == "alpha" else int(value)}
            jax.eval_shape(CRU(**proposed).init, KEY, x)


@pytest.mark.parametrize("strides", [2, 3])
def test_a_map_smaller_than_the_strides_becomes_one_pixel(strides):
    """⌈1 / strides⌉ = 1, as by a 3×3 convolution; there is nothing to average."""
    x = images(h=1, w=1)
    layer = ScConv(strides=strides)
    variables = randomised(layer, x)
    np.testing.assert_array_equal(layer.apply(variables, x), ScConv().apply(variables, x))


def test_the_arrangements_are_all_tried():
    assert set(ARRANGEMENTS) == {"S+C", "C+S", "S&C", "S", "C"}
    assert list(VARIANTS) == ["paper", "2023-07", "2023-09", "2023-10"]
