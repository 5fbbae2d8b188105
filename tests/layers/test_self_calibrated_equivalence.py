"""The operator of Liu et al. (CVPR 2020), its calibrated branch, and the blocks built of them, against PyTorch."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from scconv_jax import SelfCalibratedConv, SelfCalibration
from scconv_jax.models import resnet, scnet
from tests.equivalence import compare_module, variables_of
from tests.reference import resnet as reference_resnet
from tests.reference import scnet as reference
from tests.reference.state import nchw, nhwc, random_images, randomise

# Odd and even, square and not, sizes that the pooling divides and sizes it does not.
OPERATORS = [
    ((7, 7), {}),
    ((14, 14), {}),
    ((14, 9), {"pooling": 2}),
    ((13, 30), {"pooling": 3}),
    ((9, 9), {"strides": 2}),
    ((14, 7), {"strides": 2, "dilation": 2}),
    ((11, 13), {"dilation": 4}),
    ((8, 10), {"groups": 3}),
    ((10, 15), {"groups": 6, "strides": 2, "dilation": 2, "pooling": 3}),
]


def oracle_options(options: dict) -> dict:
    return {"stride" if key == "strides" else key: value for key, value in options.items()}


# Alone; inside the whole operator the branch meets every option below.
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("size", "options"), [OPERATORS[0], OPERATORS[3], OPERATORS[-1]], ids=str)
@pytest.mark.usefixtures("x64")
def test_self_calibration(close, size, options, train):
    oracle = randomise(reference.SelfCalibration(6, **oracle_options(options)), 0)
    x = random_images((3, *size, 6), 1)
    compare_module(close, SelfCalibration(6, **options), oracle, x, train=train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("size", "options"), OPERATORS, ids=str)
def test_self_calibrated_conv(close, precision, size, options, train):
    oracle = randomise(reference.SelfCalibratedConv(12, **oracle_options(options)), 0)
    x = random_images((3, *size, 12), 1, precision)
    compare_module(close, SelfCalibratedConv(12, **options), oracle, x, train=train)


def test_a_large_map_that_is_not_square(close, precision):
    oracle = randomise(reference.SelfCalibratedConv(4), 0)
    compare_module(close, SelfCalibratedConv(4), oracle, random_images((1, 193, 161, 4), 1, precision), train=True)


def test_bfloat16_stays_near_float32():
    oracle = randomise(reference.SelfCalibratedConv(32), 0).eval()
    x = random_images((2, 14, 14, 32), 1, np.float32)
    layer = SelfCalibratedConv(32, dtype=jnp.bfloat16)
    variables = variables_of(oracle, layer, x)
    y = layer.apply(variables, jnp.asarray(x), train=False)
    assert y.dtype == jnp.bfloat16
    expected = nhwc(oracle(nchw(x)))
    # Three convolutions in a row, each rounded to bfloat16's 8 bits.
    assert np.abs(np.asarray(y, np.float32) - expected).max() / np.abs(expected).max() < 5e-2


# name: ours, the oracle's, options of the oracle's shortcut; each with 24 channels in and planes of 16.
BLOCKS = {
    "plain": (resnet.Bottleneck, reference_resnet.Bottleneck, {}),
    "self-calibrated": (scnet.SCBottleneck, reference.SCBottleneck, {}),
    "groups": (
        partial(scnet.SCBottleneck, groups=4, bottleneck_width=8),
        partial(reference.SCBottleneck, cardinality=4, bottleneck_width=8),
        {},
    ),
    "squeeze and excitation": (
        partial(scnet.SCBottleneck, se_reduction=4),
        partial(reference.SCBottleneck, se_reduction=4),
        {},
    ),
    "v1d": (
        partial(scnet.SCBottleneck, transition=True, avd=True, avg_down=True),
        partial(reference.SCBottleneck, avd=True),
        {"avg_down": True},
    ),
}


# The norms are all that differs in evaluation: one geometry of each block is enough.
@pytest.mark.parametrize(
    ("channels", "size", "stride", "dilation", "train"),
    [
        (64, (7, 10), 1, 1, True),
        (24, (9, 14), 2, 1, True),
        (24, (9, 8), 1, 2, True),
        (24, (11, 13), 2, 2, True),
        (24, (11, 13), 2, 2, False),
    ],
    ids=["identity", "stride", "dilation", "both", "evaluation"],
)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("x64")
def test_block(close, name, channels, size, stride, dilation, train):
    block, reference_block, shortcut = BLOCKS[name]
    downsample = None
    if stride != 1 or channels != 64:
        downsample = reference_resnet.shortcut(channels, 64, stride, **shortcut)
    oracle = randomise(reference_block(channels, 16, stride=stride, dilation=dilation, downsample=downsample), 0)
    x = random_images((3, *size, channels), 1)
    compare_module(close, block(16, strides=stride, dilation=dilation), oracle, x, train=train)
