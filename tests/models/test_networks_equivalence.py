"""Every network, whole, against its PyTorch oracle: same weights, same image, every stage's map and the logits."""

import contextlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from scconv_jax import create_model, list_models
from tests.equivalence import compare_module, jit, torch_dtype, variables_of
from tests.reference.networks import NETWORKS, build
from tests.reference.state import nchw, nhwc, random_images, randomise

# Odd at every stage, and not square. The pooling needs 4×4 in the last map: 97 px at output stride 32, 49 at 16, 25 at 8.
SIZES = {32: (97, 113), 16: (49, 71), 8: (25, 39), 4: (13, 21)}


def pair(name: str, depths: tuple[int, ...] | None, *, num_classes: int, dtype: np.dtype, **options):
    """Returns the oracle of a network and the network; `depths` are other numbers of blocks."""
    model = create_model(name, num_classes=num_classes, dtype=dtype, **options)
    if depths:
        model, options = model.clone(stage_sizes=depths), options | {"depths": depths}
    return randomise(build(name, num_classes=num_classes, **options), 0).to(torch_dtype(dtype)).eval(), model


def compare_network(close, name: str, size: tuple[int, int], dtype: np.dtype, *, whole=True, depths=None, **options) -> None:
    """Compares a network compiled as a whole, or else operation by operation; `depths` are other numbers of blocks."""
    oracle, model = pair(name, depths, num_classes=10, dtype=dtype, **options)
    images = random_images((1, *size, 3), 1, dtype)
    with torch.no_grad():
        maps = oracle.features(nchw(images)) if hasattr(oracle, "features") else {}
        logits = oracle(nchw(images))

    def run(variables, images):
        features = model.apply(variables, images, train=False, method="features")

        def known(next_call, args, kwargs, context):
            return features if context.method_name == "features" else next_call(*args, **kwargs)

        # XLA sees that both calls compute the same maps. By operations, the second would compute them again.
        with contextlib.nullcontext() if whole else nn.intercept_methods(known):
            return features, model.apply(variables, images, train=False)

    found, found_logits = (jit(run) if whole else run)(variables_of(oracle, model, images), jnp.asarray(images))
    assert not maps or list(found) == list(maps)
    for stage, value in maps.items():
        close(found[stage], nhwc(value), f"{name} {stage}")
    close(found_logits, logits.numpy(), f"{name} logits")


def deep(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def test_every_model_has_an_oracle():
    assert set(list_models()) == set(NETWORKS)


@pytest.mark.parametrize("name", [deep(name) if "101" in name else name for name in NETWORKS])
@pytest.mark.usefixtures("x64")
def test_network(close, name):
    # Networks of these depths repeat a few blocks, so they share few operations. To compile SCNet-101 whole takes three
    # times as long as to run it by operations that SCNet-50 has compiled. Other tests compile such networks whole.
    whole = re.search(r"(50|56_small|101)(_v1d)?$", name) is None
    compare_network(close, name, SIZES[4 if name.endswith("_small") else 32], np.dtype(np.float64), whole=whole)


# All trunks get their strides and dilations from `models.resnet`: SCNet-50 is compared whole, the others with two blocks a stage.
@pytest.mark.parametrize(
    ("name", "output_stride"), [("scnet50", 16), ("scnet50", 8), ("scnet50_v1d", 8), ("resnet50", 16), ("scnext50", 8)]
)
@pytest.mark.usefixtures("x64")
def test_dilated_network(close, name, output_stride):
    depths = None if (name, output_stride) == ("scnet50", 8) else (2, 2, 2, 2)
    compare_network(close, name, SIZES[output_stride], np.dtype(np.float64), depths=depths, output_stride=output_stride)


@pytest.mark.usefixtures("x64")
def test_wide_network_that_strides_in_the_first_convolution(close):
    """As wide networks were published; the ones by name stride in the second, as the ScConv paper's did."""
    compare_network(close, "wrn28_10_small", SIZES[4], np.dtype(np.float64), strided="conv1")


@pytest.mark.parametrize("name", [deep("scnet50"), deep("scnet50_v1d")])
def test_network_in_float32_at_the_size_it_was_trained_on(close, name):
    compare_network(close, name, (224, 224), np.dtype(np.float32))


# At these sizes the last pool leaves one pixel or two. A BatchNorm over so few values has a gradient that is a small
# difference of large terms, hence batches of 5, and for the deep network a limit of its own for gradients.
@pytest.mark.parametrize(
    ("name", "depths", "size", "limit"),
    [("scnet20_small", None, (15, 18), 1e-12), ("scnet50_v1d", (1, 2, 1, 1), (97, 97), 1e-11)],
)
@pytest.mark.usefixtures("x64")
def test_training_pass(close, name, depths, size, limit):
    """Logits, gradients to the images and to every parameter, and running statistics, in training."""
    oracle, model = pair(name, depths, num_classes=7, dtype=np.dtype(np.float64))

    def close_within(ours, theirs, what="output"):
        close(ours, theirs, what, limit=limit if what.startswith("gradient") else None)

    compare_module(close_within, model, oracle, random_images((5, *size, 3), 1), train=True)


@pytest.mark.parametrize("name", ["scnet50", "resnet20_small"])
def test_bfloat16_agrees_on_the_class(name):
    """Eight bits through fifty layers: logits stay near, and float32 in dtype."""
    oracle = randomise(build(name, num_classes=10), 0).eval()
    model = create_model(name, num_classes=10, dtype=jnp.bfloat16)
    images = random_images((2, 97, 97, 3), 1, np.float32)
    variables = variables_of(oracle, model, images)
    logits = jit(lambda variables, images: model.apply(variables, images, train=False))(variables, jnp.asarray(images))
    with torch.no_grad():
        expected = oracle(nchw(images)).numpy()
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 0.1
    np.testing.assert_array_equal(np.argmax(logits, -1), expected.argmax(-1))
