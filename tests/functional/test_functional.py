"""The pure functions by themselves: no Flax, any transformation, and errors that say what to do."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scconv_jax import functional as F

KEYS = jax.random.split(jax.random.key(0), 5)
X = jax.random.normal(KEYS[0], (3, 9, 14, 8))
KERNELS = [0.2 * jax.random.normal(key, (3, 3, 4, 4)) for key in KEYS[1:]]


def operator(x, kernels):
    """The whole operator with plain convolutions: two lines, as a user of any JAX library would write it."""
    k1, k2, k3, k4 = (partial(F.conv, kernel=kernel, padding=1) for kernel in kernels)
    return F.self_calibrated_conv(x, k1, k2, k3, k4)


def test_jit():
    np.testing.assert_allclose(jax.jit(operator)(X, KERNELS), operator(X, KERNELS), atol=1e-5)


def test_grad():
    """Against a difference quotient along a random direction, in float64."""
    with jax.enable_x64(True):
        x, kernels = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (X, KERNELS))
        direction = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), (x, kernels))

        def loss(x, kernels):
            return jnp.sum(operator(x, kernels) ** 2)

        def along(step):
            return loss(*jax.tree.map(lambda leaf, d: leaf + step * d, (x, kernels), direction))

        gradients = jax.grad(loss, (0, 1))(x, kernels)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradients, direction)))
        quotient = (along(1e-5) - along(-1e-5)) / 2e-5
        assert float(slope) == pytest.approx(float(quotient), rel=1e-7)


def test_vmap_over_images_and_over_kernels():
    by_image = jax.vmap(lambda x: operator(x[None], KERNELS)[0])(X)
    np.testing.assert_allclose(by_image, operator(X, KERNELS), atol=1e-5)
    ensemble = [jnp.stack([kernel, -kernel]) for kernel in KERNELS]
    both = jax.vmap(operator, in_axes=(None, 0))(X, ensemble)
    np.testing.assert_allclose(both[1], operator(X, [-kernel for kernel in KERNELS]), atol=1e-5)


def test_gradient_of_each_image_by_itself():
    gradients = jax.vmap(jax.grad(lambda kernels, x: operator(x[None], kernels).sum()), in_axes=(None, 0))(KERNELS, X)
    total = jax.grad(lambda kernels: operator(X, kernels).sum())(KERNELS)
    for single, whole in zip(gradients, total, strict=True):
        np.testing.assert_allclose(single.sum(0), whole, atol=1e-3)


def test_forward_mode():
    _, forward = jax.jvp(partial(operator, kernels=KERNELS), (X,), (jnp.ones_like(X),))
    _, vjp = jax.vjp(partial(operator, kernels=KERNELS), X)
    assert float(forward.sum()) == pytest.approx(float(vjp(jnp.ones_like(forward))[0].sum()), rel=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_stays(dtype):
    x = X.astype(dtype)
    assert operator(x, [kernel.astype(dtype) for kernel in KERNELS]).dtype == dtype
    for y in (F.avg_pool(x, 3, 2, padding=1), F.max_pool(x, 3, 2, padding=1), F.global_avg_pool(x), F.avg_pool(x, 2)):
        assert y.dtype == dtype
    assert F.resize_nearest(x, (5, 20)).dtype == dtype


@pytest.mark.parametrize("strides", [4, 2])
def test_averages_of_many_values_in_bfloat16_are_not_lost(strides):
    """Summed in bfloat16, 64² ones would stop at 256."""
    x = jnp.ones((1, 64, 64, 2), jnp.bfloat16)
    np.testing.assert_array_equal(F.avg_pool(x, 64), np.ones((1, 1, 1, 2)))
    np.testing.assert_array_equal(F.avg_pool(x, 32, strides), 1)
    np.testing.assert_array_equal(F.global_avg_pool(x), np.ones((1, 2)))


def test_the_gate_is_half_where_nothing_speaks():
    """σ(0) = ½: with X = 0 the operator is 0; with zero K2, what K3 gives is gated by the map alone."""
    np.testing.assert_array_equal(operator(jnp.zeros_like(X), KERNELS), 0)
    k3 = partial(F.conv, kernel=KERNELS[2], padding=1)
    x = X[..., :4]
    found = F.self_calibration(x, jnp.zeros_like, k3, lambda y: y)
    np.testing.assert_allclose(found, k3(x) * jax.nn.sigmoid(x), atol=1e-6)


def test_each_half_goes_its_own_way():
    """Y1 depends on X1 alone, Y2 on X2 alone, and Y2 is a plain convolution."""
    base = operator(X, KERNELS)
    first, second = operator(X.at[..., :4].add(1.0), KERNELS), operator(X.at[..., 4:].add(1.0), KERNELS)
    np.testing.assert_array_equal(first[..., 4:], base[..., 4:])
    np.testing.assert_array_equal(second[..., :4], base[..., :4])
    assert jnp.abs(first - base)[..., :4].max() > 0.1
    np.testing.assert_allclose(base[..., 4:], F.conv(X[..., 4:], KERNELS[0], padding=1), atol=1e-5)


@pytest.mark.parametrize(("size", "window"), [((3, 9), 4), ((9, 1), 2)])
def test_pool_larger_than_the_map(size, window):
    with pytest.raises(ValueError, match=rf"{window}×{window}.*at least {window} px.*got {size[0]}×{size[1]}"):
        F.avg_pool(jnp.zeros((1, *size, 2)), window)


def test_pool_that_even_ceiling_mode_does_not_save():
    with pytest.raises(ValueError, match=r"5×5 needs a map of at least 4 px.*got 3×9"):
        F.avg_pool(jnp.zeros((1, 3, 9, 2)), 5, 2, ceil_mode=True)


@pytest.mark.parametrize("window", [0, -1, (2, 2), 1.5])
@pytest.mark.usefixtures("unchecked")
def test_a_window_that_is_no_whole_number(window):
    with pytest.raises(ValueError, match=re.escape(f"window={window!r} must be one positive integer.")):
        F.avg_pool(X, window)


@pytest.mark.parametrize("shape", [(8, 8, 4), (8, 4), (1, 1, 8, 8, 4)])
@pytest.mark.usefixtures("unchecked")
def test_maps_without_four_axes(shape):
    x = jnp.zeros(shape)
    functions = [
        lambda: F.conv(x, KERNELS[0]),
        lambda: F.avg_pool(x, 2),
        lambda: F.spatial_reconstruction(x, jnp.ones(4), jnp.zeros(4), groups=1),
    ]
    for function in functions:
        with pytest.raises(
            ValueError, match=re.escape(f"expected maps of shape (n, h, w, c), channels last; got {shape}.")
        ) as error:
            function()
        assert ("x[None]" in str(error.value)) == (len(shape) == 3)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_batch_of_no_images(padding):
    y = F.conv(X[:0], jnp.zeros((1 + 2 * padding, 1 + 2 * padding, 8, 5)), padding=padding)
    assert y.shape == (0, 9, 14, 5)


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_are_averaged_as_floats():
    """W is between 0 and 1: as whole numbers nothing would be left of it."""
    x = jnp.arange(2 * 4 * 4 * 8).reshape(2, 4, 4, 8)
    y, expected = (F.spatial_reconstruction(x, jnp.ones(8), jnp.zeros(8), groups=4) for x in (x, x.astype(jnp.float32)))
    np.testing.assert_array_equal(y, expected, strict=True)


def test_odd_channels():
    with pytest.raises(ValueError, match=r"7 is odd.*6 or 8"):
        F.self_calibrated_conv(jnp.zeros((1, 8, 8, 7)), *[lambda x: x] * 4)


def test_channels_that_do_not_fit_the_kernel():
    with pytest.raises(ValueError, match=r"8 channels.*\(3, 3, 4, 4\).*groups=1.*4"):
        F.conv(X, KERNELS[0])
