"""ScConv in all its versions against PyTorch oracles written from the paper and from what is known of the public code."""

import numpy as np
import pytest
import torch

from scconv_jax import CRU, SRU, ScConv, to_torch
from tests.equivalence import compare_module, variables_of
from tests.reference import scconv as reference
from tests.reference.state import nchw, random_images, randomise

VARIANTS = list(reference.VERSIONS)


def options_for(channels: int, alpha: float, variant: str) -> dict:
    """The defaults, or what comes nearest to them where they do not divide so few channels."""
    upper = int(alpha * channels) // 2
    options = {"alpha": alpha, "conv_groups": 1 if upper % 2 else 2}
    return options | ({"groups": 4} if channels % reference.VERSIONS[variant].groups else {})


def compare(close, channels: int, size: tuple[int, int], dtype, variant: str, **options) -> None:
    """Compares the whole operator in values and gradients, for weights of the gate that rounding cannot carry over."""
    renamed = {"stride" if key == "strides" else key: value for key, value in options.items()}
    oracle = randomise(reference.ScConv(channels, variant, **renamed), 0).double()
    x = images_off_the_threshold(oracle, (2, *size, channels), dtype)
    layer = ScConv(variant=variant, **options)
    compare_module(close, layer, oracle, x, train=False, dead=dead_parameters(oracle, variant))


def dead_parameters(oracle, variant: str) -> list[str]:
    """With a gate that is a step and passes X itself, nothing flows back to gamma and beta."""
    return [name for name, _ in oracle.named_parameters() if variant == "2023-07" and "gn." in name]


def images_off_the_threshold(oracle, shape, dtype) -> np.ndarray:
    """Maps on which no weight lies so near the gate's threshold that another order of summing would carry it over."""
    margin = 1e-13 if np.dtype(dtype) == np.float64 else 1e-6
    for seed in range(200):
        x = random_images(shape, seed, dtype)
        distances = []

        def record(module, inputs, distances=distances):
            _, weights = module.weights(inputs[0])
            distances.append((weights - module.threshold).abs().min().item())

        hooks = [m.register_forward_pre_hook(record) for m in oracle.modules() if isinstance(m, reference.SRU)]
        with torch.no_grad():
            oracle(nchw(x).double())
        for hook in hooks:
            hook.remove()
        if all(distance > margin for distance in distances):
            return x
    raise AssertionError("no input stays off the threshold; take a smaller map")


CHANNELS = [8, 16, 48, 64, 96]
ALPHAS = [0.25, 0.5, 0.75, 0.875]


# How channels are split does not depend on the variant, so each pair of channels and alpha is compared in one variant; the
# variants take turns, so that each meets all channels and all alphas. With 8 channels and alpha 7/8 nothing would be left
# of the lower part.
SIZES = [(c, a, VARIANTS[(i + j) % 4]) for i, c in enumerate(CHANNELS) for j, a in enumerate(ALPHAS) if (c, a) != (8, 0.875)]


@pytest.mark.parametrize(("channels", "alpha", "variant"), [*SIZES, (8, 0.5, VARIANTS[3])])
@pytest.mark.usefixtures("x64")
def test_sizes(close, channels, alpha, variant):
    compare(close, channels, (7, 5), np.float64, variant, **options_for(channels, alpha, variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(7, 5), (3, 10)])
def test_float32(close, variant, size):
    compare(close, 16, size, np.float32, variant, **options_for(16, 0.5, variant))


# The gate's options, which each variant treats in its own way, and those of the CRU and of what is around the units.
GATE_OPTIONS = [{"groups": 1}, {"groups": 8, "threshold": 0.503}, {"threshold": 0.49}, {"threshold": 1.5}]
OTHER_OPTIONS = [
    {"kernel_size": 5},
    {"kernel_size": 1, "conv_groups": 4},
    {"squeeze": 1, "conv_groups": 4},
    {"squeeze": 4, "alpha": 0.75, "conv_groups": 1},
    {"strides": 2},
    {"strides": 3, "features": 10},
    {"features": 40},
]


@pytest.mark.parametrize(
    ("variant", "options"),
    [(variant, options) for variant in VARIANTS for options in GATE_OPTIONS]
    + [(VARIANTS[i % 4], options) for i, options in enumerate(OTHER_OPTIONS)],
    ids=str,
)
@pytest.mark.usefixtures("x64")
def test_options(close, variant, options):
    compare(close, 16, (9, 14), np.float64, variant, **options)


# S+C is the arrangement of every other test, and `test_units_alone` compares the units of each variant.
@pytest.mark.parametrize(
    ("arrangement", "variant"),
    [("C+S", "paper"), ("C+S", "2023-07"), ("S&C", "2023-09"), ("S&C", "2023-10"), ("S", "2023-07"), ("C", "2023-10")],
)
@pytest.mark.usefixtures("x64")
def test_arrangement(close, arrangement, variant):
    compare(close, 16, (7, 10), np.float64, variant, arrangement=arrangement)


@pytest.mark.usefixtures("x64")
def test_a_lower_part_that_fills_the_output_by_itself(close):
    """With features = (1 - alpha) C / r, PWC2 has no outputs and is not there; with one more, it has one."""
    x = random_images((2, 5, 7, 16), 1)
    for features, convolutions in [(4, 4), (6, 5)]:
        oracle = randomise(reference.CRU(16, reference.VERSIONS["paper"], features), 0)
        assert sum(name.endswith("weight") for name in oracle.state_dict()) == convolutions
        compare_module(close, CRU(features), oracle, x, train=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("x64")
def test_units_alone(close, variant):
    version = reference.VERSIONS[variant]
    for layer, oracle in [
        (CRU(variant=variant), reference.CRU(16, version)),
        (SRU(variant=variant), reference.SRU(16, version)),
    ]:
        x = images_off_the_threshold(randomise(oracle, 0).double(), (2, 7, 10, 16), np.float64)
        compare_module(close, layer, oracle, x, train=False, dead=dead_parameters(oracle, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_over_and_back(variant):
    oracle = randomise(reference.ScConv(16, variant), 0)
    found = to_torch(variables_of(oracle, ScConv(variant=variant), np.zeros((1, 8, 8, 16), np.float32)))
    expected = oracle.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)
