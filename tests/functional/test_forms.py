"""Functions that have one form for CPU and another for accelerators: equal results, and only one form in a compiled program."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec

from scconv_jax import functional as F
from scconv_jax.functional.batch_norm import one_pass_moments, two_pass_moments
from scconv_jax.functional.convolution import (
    blocked_conv,
    conv,
    dense_blocks,
    form_on_cpu,
    joined_twins,
    matmul_conv,
    native_conv,
    product_conv,
    twin_convs,
)
from scconv_jax.functional.pooling import compared_max_pool, indexed_max_pool, native_max_pool
from scconv_jax.functional.rectifier import relu_of_sum, stored_relu
from scconv_jax.models.scnet import SCBottleneck

# form, kernel's shape, strides, padding, dilation, groups
FORMS = [
    (matmul_conv, (1, 1, 32, 6), 1, 0, 1, 1),
    (matmul_conv, (1, 1, 32, 6), 2, 0, 1, 1),
    (product_conv, (3, 3, 1, 32), 1, 1, 1, 32),
    (product_conv, (5, 3, 1, 32), 2, 2, 1, 32),
    (product_conv, (3, 3, 1, 32), 2, 2, 2, 32),
    (blocked_conv, (3, 3, 16, 6), 1, 1, 1, 2),
    (blocked_conv, (3, 3, 4, 16), 2, 2, 2, 8),
    (blocked_conv, (1, 1, 16, 6), 3, 0, 1, 2),
    (blocked_conv, (3, 3, 1, 64), 1, 1, 1, 32),
]


def value_and_gradients(function, *arrays):
    value, vjp = jax.vjp(function, *arrays)
    return value, *vjp(jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("form", "shape", "strides", "padding", "dilation", "groups"), FORMS)
def test_each_form_of_a_convolution_equals_xlas_own(form, shape, strides, padding, dilation, groups):
    assert form_on_cpu(shape, padding, groups) is form
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.standard_normal((2, 9, 12, 32))), jnp.asarray(rng.standard_normal(shape))
    options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    parts = jnp.split(x, dense_blocks(groups, 32) if form is blocked_conv else 1, axis=-1)
    expected = value_and_gradients(partial(native_conv, **options), kernel, *parts)
    found = value_and_gradients(partial(form, **options), kernel, *parts)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_both_forms_of_twin_convolutions_equal_two_calls():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 5, 7, 12), (1, 1, 12, 4), (1, 1, 12, 3)))

    def joined(form):
        return value_and_gradients(lambda x, a, b: jnp.concatenate(form(x, a, b), axis=-1), x, a, b)

    expected = joined(lambda x, a, b: (conv(x, a), conv(x, b)))
    for form in (twin_convs, lambda x, a, b: joined_twins(x, x, a, b)):
        for result, value in zip(joined(form), expected, strict=True):
            np.testing.assert_allclose(result, value, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", [compared_max_pool, indexed_max_pool])
@pytest.mark.parametrize(("window", "strides", "padding"), [(3, 2, 1), (2, 2, 0), (2, 2, 1), (3, 1, 1), (5, 3, 2)])
def test_all_forms_of_max_pooling_give_the_gradient_to_the_first_of_equal_maxima(form, window, strides, padding):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 7, 9, 3)).astype(float) - 5)
    options = {"window": window, "strides": strides, "padding": padding}
    found = value_and_gradients(partial(form, **options), x)
    expected = value_and_gradients(partial(native_max_pool, **options), x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-15)


def test_nan_is_the_maximum_of_its_window_in_all_forms():
    x = jnp.zeros((1, 6, 6, 2)).at[0, 2, 3, 1].set(jnp.nan)
    expected = native_max_pool(x, window=3, strides=2, padding=1)
    assert jnp.isnan(expected).sum() == 2
    for form in (compared_max_pool, indexed_max_pool):
        np.testing.assert_array_equal(form(x, window=3, strides=2, padding=1), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("distance", [0.0, 1.0, 5.0])
def test_both_forms_of_the_moments_are_equal_with_any_shift(distance):
    """`distance` is that of the shift from the mean, in standard deviations."""
    x = jnp.asarray(np.random.default_rng(0).normal(100, 2, (3, 5, 7, 4)))
    shift = x.mean((0, 1, 2)) + 2 * distance

    def combined(form, x):
        mean, var = form(x, shift)
        return jnp.concatenate([mean, var])

    found, expected = (value_and_gradients(partial(combined, form), x) for form in (one_pass_moments, two_pass_moments))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_one_pass_keeps_the_digits_of_a_small_variance_beside_a_large_mean():
    """In float32, E[x²] - E[x]² would have none left."""
    x = np.random.default_rng(0).normal(3000, 0.5, (8, 30, 30, 2)).astype(np.float32)
    shift = jnp.full(2, 3001, jnp.float32)  # two standard deviations away
    _, var = one_pass_moments(jnp.asarray(x), shift)
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-5)
    assert abs((np.square(x).mean() - np.square(x.mean())) - 0.25) > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_the_relu_of_a_sum_have_the_same_bits_also_at_zero_and_nan(dtype):
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, -jnp.inf, jnp.nan], dtype)
    expected = value_and_gradients(jax.nn.relu, x)
    for form in (stored_relu, relu_of_sum, jax.jit(stored_relu)):
        for found, value in zip(value_and_gradients(form, x), expected, strict=True):
            np.testing.assert_array_equal(np.float32(found), np.float32(value))
    second = jax.grad(jax.grad(lambda x: stored_relu(x) ** 3))(jnp.float32(2))
    assert second == 12


def test_a_block_of_scnet_in_training_on_an_accelerator_reads_its_input_once_and_the_gradient_of_its_relu_reads_the_result():
    block, x = SCBottleneck(planes=8), jnp.ones((2, 8, 8, 32))
    variables = block.init(jax.random.key(0), x, train=False)

    def loss(variables, x):
        return block.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    step = jax.jit(jax.grad(loss)).trace(variables, x)
    texts = {platform: step.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    for platform in ("cuda", "tpu"):
        assert "tensor<1x1x32x8xf32>" in texts[platform], "conv1_a and conv1_b, joined"
        assert not re.search(r"stablehlo.convolution.*tensor<1x1x32x4xf32>", texts[platform])
        assert texts[platform].count("stablehlo.optimization_barrier") == 1
    assert "stablehlo.optimization_barrier" not in texts["cpu"]


X, POINTWISE, GROUPED = jnp.ones((8, 6, 6, 32)), jnp.ones((1, 1, 32, 32)), jnp.ones((3, 3, 1, 32))


def network(x):
    """A function of every form: pointwise with strides, ReLU, depthwise, max-pool."""
    x = relu_of_sum(F.conv(jnp.sin(x), POINTWISE, strides=2) + 1)
    return F.max_pool(F.conv(x, GROUPED, padding=1, groups=32), 2, 1).sum(axis=(1, 2, 3))


def gradient(x):
    return jax.grad(lambda x: network(x).sum())(x)


ROWS = PartitionSpec("devices")


def mesh():
    return Mesh(np.array(jax.devices()[:8]), ("devices",))


TRANSFORMATIONS = {
    "jit": lambda x: network(x),
    "grad": gradient,
    "vmap": lambda x: jax.vmap(lambda image: gradient(image[None]))(x),
    "scan": lambda x: jax.lax.scan(lambda total, y: (total + gradient(y[None]), None), jnp.zeros_like(x[:1]), x)[0],
    "remat": jax.grad(lambda x: jax.checkpoint(network)(x).sum()),
    "shard_map": lambda x: jax.shard_map(
        gradient, mesh=Mesh(np.array(jax.devices()[:8]), ("devices",)), in_specs=ROWS, out_specs=ROWS
    )(x),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_program_for_cpu_has_only_the_forms_for_cpu(name):
    program = jax.jit(TRANSFORMATIONS[name]).lower(X)
    assert "stablehlo.convolution" not in program.as_text()
    assert "reduce_window" not in program.as_text()
    assert " conditional(" not in program.compile().as_text()


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("name", ["jit", "grad", "vmap", "scan", "remat"])
def test_a_program_for_an_accelerator_has_only_its_own_forms(name, platform):
    text = jax.jit(TRANSFORMATIONS[name]).trace(X).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" in text
    assert "stablehlo.dot_general" not in text
    assert (("reduce_window" if name == "jit" else "select_and_scatter") in text) == (platform == "tpu")


def test_a_program_exported_for_all_platforms_runs_here():
    exported = export.export(jax.jit(gradient), platforms=("cpu", "cuda", "tpu"))(X)
    np.testing.assert_array_equal(exported.call(X), jax.jit(gradient)(X))
