"""The layers that every network is made of, against `torch.nn`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from scconv_jax import layers
from tests.equivalence import compare_module, compare_statistics, torch_dtype, variables_of
from tests.reference.state import nchw, nhwc, random_images, randomise

CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "use_bias": True},
    {"kernel_size": 1, "strides": 2},
    {"kernel_size": 1, "groups": 3},
    {"kernel_size": 3, "padding": 1, "use_bias": True},
    {"kernel_size": 3, "padding": 1, "strides": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 3},
    {"kernel_size": 3, "padding": 1, "groups": 6},
    {"kernel_size": 7, "padding": 3, "strides": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_conv(close, precision, options):
    rename = {"strides": "stride", "use_bias": "bias"}
    theirs = {"bias": False} | {rename.get(key, key): value for key, value in options.items()}
    oracle = randomise(nn.Conv2d(6, 12, **theirs), 0)
    compare_module(close, layers.Conv(12, **options), oracle, random_images((2, 7, 10, 6), 1, precision), train=False)


def test_dense(close, precision):
    oracle = randomise(nn.Linear(7, 5), 0)
    x = np.random.default_rng(1).standard_normal((3, 7)).astype(precision)
    compare_module(close, layers.Dense(5), oracle, x, train=False)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "epsilon": 1e-3}], ids=str)
def test_batch_norm(close, precision, options, train):
    theirs = {"momentum": 1 - options.get("momentum", 0.9), "eps": options.get("epsilon", 1e-5)}
    oracle = randomise(nn.BatchNorm2d(6, **theirs), 0)
    x = 3 * random_images((2, 3, 5, 6), 1, precision) + 2
    compare_module(close, layers.BatchNorm(**options), oracle, x, train=train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("strides", [1, 2])
def test_conv_norm(close, precision, strides, train):
    oracle = nn.Sequential(nn.Conv2d(6, 8, 3, strides, padding=2, dilation=2, groups=2, bias=False), nn.BatchNorm2d(8))
    layer = layers.ConvNorm(8, 3, strides=strides, dilation=2, groups=2)
    compare_module(close, layer, randomise(oracle, 0), random_images((2, 7, 10, 6), 1, precision), train=train)


def test_batch_norm_statistics_after_several_steps(close, precision):
    """Five batches, of other sizes: the correction n / (n - 1) differs from one to the next."""
    oracle = randomise(nn.BatchNorm2d(4), 0).to(torch_dtype(precision)).train()
    layer = layers.BatchNorm()
    variables = variables_of(oracle, layer, random_images((1, 2, 2, 4), 1, precision))
    for step, shape in enumerate([(1, 1, 2, 4), (2, 3, 3, 4), (1, 7, 5, 4), (3, 1, 1, 4), (2, 2, 2, 4)]):
        x = (step + 1) * random_images(shape, step, precision) + step
        expected = oracle(nchw(x))
        y, new = layer.apply(variables, jnp.asarray(x), train=True, mutable=["batch_stats"])
        variables = {**variables, **new}
        close(y, nhwc(expected), f"output of step {step}")
        compare_statistics(close, variables["params"], new["batch_stats"], oracle)


# float32 has 7 digits: at 1e4 the data itself is rounded to 1e-3. PyTorch's own error on these is about 1e-4 at mean 100, and
# 1e-3 at 1e4; a variance taken as E[x²] - E[x]² without a shift has none of its digits left at 1e4, and an error of 1.
@pytest.mark.parametrize("mean", [1e2, 1e4, -1e4])
@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_keeps_its_digits_far_from_zero(mean, train):
    x = (mean + np.random.default_rng(0).uniform(-1, 1, (8, 14, 14, 4))).astype(np.float32)
    oracle = nn.BatchNorm2d(4).double().train(train)
    with torch.no_grad():
        oracle.running_mean.fill_(mean)
        oracle.running_var.fill_(1 / 3)
    expected = oracle(nchw(x).double())
    layer = layers.BatchNorm()
    variables = {
        "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "batch_stats": {"mean": jnp.full(4, mean), "var": jnp.full(4, 1 / 3)},
    }
    y, new = layer.apply(variables, jnp.asarray(x), train=train, mutable=["batch_stats"])
    np.testing.assert_allclose(y, nhwc(expected), atol=5e-3)
    if train:
        np.testing.assert_allclose(new["batch_stats"]["mean"], oracle.running_mean.numpy(), rtol=2e-7)
        np.testing.assert_allclose(new["batch_stats"]["var"], oracle.running_var.numpy(), rtol=1e-4)


def test_batch_norm_takes_bfloat16_statistics_in_float32(close):
    """A sum of thousands of values in bfloat16 would stop growing; the statistics are those of float32."""
    x = jnp.asarray(5 + random_images((16, 16, 16, 3), 0, np.float32), jnp.bfloat16)
    exact = np.asarray(x, np.float32)  # the values that bfloat16 holds
    oracle = randomise(nn.BatchNorm2d(3), 1).train()
    layer = layers.BatchNorm(dtype=jnp.bfloat16)
    variables = variables_of(oracle, layer, exact)
    y, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = oracle(nchw(exact))
    assert y.dtype == jnp.bfloat16
    compare_statistics(close, variables["params"], new["batch_stats"], oracle)
    # Half a unit in the last of bfloat16's 8 digits, and a little for the float32 before it.
    np.testing.assert_allclose(np.asarray(y, np.float32), nhwc(expected), rtol=2**-8 * 1.01, atol=1e-5)


def test_convolution_in_bfloat16_stays_near_float32():
    oracle = randomise(nn.Conv2d(64, 8, 3, padding=1, bias=False), 0)
    x = random_images((1, 7, 7, 64), 1, np.float32)
    layer = layers.Conv(8, 3, padding=1, dtype=jnp.bfloat16)
    variables = variables_of(oracle, layer, x)
    assert jax.tree.leaves(variables)[0].dtype == jnp.float32
    y = layer.apply(variables, jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    expected = nhwc(oracle(nchw(x)))
    assert np.abs(np.asarray(y, np.float32) - expected).max() / np.abs(expected).max() < 2e-2
