"""The operators and layers under `jax.export`, with heights and widths that are known only when the program is called."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import scconv_jax
from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm
from scconv_jax.layers.squeeze_excitation import SqueezeExcitation

SIZES = ((32, 64), (96, 32), (64, 64))
CHANNELS = 32


def kernel(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def maps(size):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, CHANNELS)), jnp.float32)


OPERATORS = {
    "avg_pool, tiles": partial(F.avg_pool, window=4),
    "avg_pool, a rest": partial(F.avg_pool, window=5),
    "avg_pool, pads counted": partial(F.avg_pool, window=3, strides=2, padding=1),
    "avg_pool, pads not counted": partial(F.avg_pool, window=3, strides=2, padding=1, count_include_pad=False),
    "avg_pool, ceiling": partial(F.avg_pool, window=4, strides=2, ceil_mode=True, count_include_pad=False),
    "max_pool": partial(F.max_pool, window=3, strides=2, padding=1),
    "resize_nearest, equal repeats": lambda x: F.resize_nearest(F.avg_pool(x, 4), x.shape[1:3]),
    "resize_nearest, unequal repeats": lambda x: F.resize_nearest(F.avg_pool(x, 5), x.shape[1:3]),
    "conv 1×1, strided": partial(F.conv, kernel=kernel(1, 1, CHANNELS, 4), strides=2),
    "conv 3×3, dilated": partial(F.conv, kernel=kernel(3, 3, CHANNELS, 4), padding=2, dilation=2),
    "conv, depthwise": partial(F.conv, kernel=kernel(3, 3, 1, CHANNELS), strides=2, padding=1, groups=CHANNELS),
    "conv, grouped": partial(F.conv, kernel=kernel(3, 3, 16, CHANNELS), strides=2, padding=1, groups=2),
}

LAYERS = {
    "SelfCalibratedConv": scconv_jax.SelfCalibratedConv(CHANNELS, strides=2),
    "SelfCalibration, other pooling": scconv_jax.SelfCalibration(CHANNELS, pooling=3),
    "ScConv": scconv_jax.ScConv(2 * CHANNELS, strides=2),
    "ScConv of 2023-07": scconv_jax.ScConv(variant="2023-07", arrangement="C+S"),
    "GhostConv": scconv_jax.GhostConv(CHANNELS, strides=2, norm=BatchNorm),
    "SqueezeExcitation": SqueezeExcitation(4),
}


def check(function, *symbolic, sizes=SIZES):
    """Export a function of maps once, and compare it with the plain call at three sizes."""
    exported = export.export(jax.jit(function))(jax.ShapeDtypeStruct((*symbolic, CHANNELS), jnp.float32))
    for size in sizes:
        plain, found = (jax.tree.leaves(call(maps(size))) for call in (jax.jit(function), exported.call))
        assert [leaf.shape for leaf in found] == [leaf.shape for leaf in plain]
        for ours, theirs in zip(found, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # rounding: XLA fuses the two programs differently


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    check(OPERATORS[name], *export.symbolic_shape("n, 32*h, 32*w"))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, train):
    layer = LAYERS[name]
    options = {"mutable": ["batch_stats"]} if train else {}
    options |= {} if name == "SqueezeExcitation" else {"train": train}
    variables = layer.init(jax.random.key(0), maps((32, 32)), **{key: value for key, value in options.items() if key == "train"})
    check(partial(layer.apply, variables, **options), *export.symbolic_shape("n, 32*h, 32*w"))


def test_sizes_that_are_no_multiple():
    """As long as nothing depends on it: `h` alone is any size from 1 on."""
    conv = partial(F.conv, kernel=kernel(3, 3, CHANNELS, 4), strides=2, padding=1)
    check(conv, *export.symbolic_shape("n, h, w"), sizes=((7, 5), (1, 2), (9, 9)))
    sru = partial(
        F.spatial_reconstruction, gamma=kernel(CHANNELS), beta=kernel(CHANNELS), groups=CHANNELS, unbiased=True, epsilon=0.1
    )
    check(sru, *export.symbolic_shape("n, h, w"), sizes=((7, 5), (1, 1), (9, 9)))  # one pixel has no unbiased deviation


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (partial(F.avg_pool, window=4), "n, h, 8*w", r"The symbolic size h may be below 4, .*give .* the constraint 'h >= 4'\."),
        (partial(F.avg_pool, window=20), "n, 8*h, 80", r"The symbolic size 8\*h may be below 20, .* the constraint 'h >= 3'\."),
        (
            partial(F.avg_pool, window=2, ceil_mode=True),
            "n, 8, 3*w",
            r"The symbolic size 3\*w must be a multiple of 2 here\. For jax\.export, give .* the size as 6\*w\.",
        ),
        (
            partial(F.avg_pool, window=3, strides=2, ceil_mode=True),
            "n, 2*h, 9",
            r"The symbolic size 2\*h \+ 1 must be a multiple",
        ),
        (
            lambda x: BatchNorm().init(jax.random.key(0), x[:, 0, 0], train=True),
            "n, 8, 8",
            r"The symbolic size n may be below 2, .* the constraint 'n >= 2'\.",
        ),
    ],
)
def test_what_depends_on_the_size_names_the_constraint(function, shape, message):
    images = jax.ShapeDtypeStruct((*export.symbolic_shape(shape), CHANNELS), jnp.float32)
    with pytest.raises(ValueError, match=message):
        export.export(jax.jit(function))(images)


def test_the_named_constraint_suffices():
    shape = export.symbolic_shape("n, 8*h, 80", constraints=["h >= 3"])
    check(partial(F.avg_pool, window=20), *shape, sizes=((24, 80), (80, 80)))
