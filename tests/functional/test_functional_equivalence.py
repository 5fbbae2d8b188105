"""Every pure function against PyTorch's, in values and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as T

from scconv_jax import functional as F
from scconv_jax.functional.resizing import source_pixels
from tests.equivalence import jit, torch_dtype
from tests.reference.scnet import SelfCalibratedConv, SelfCalibration
from tests.reference.state import nchw, nhwc, random_images, randomise


def hwio(kernel: torch.Tensor) -> np.ndarray:
    """PyTorch's `(out, in, h, w)` kernel as `(h, w, in, out)`."""
    return kernel.detach().permute(2, 3, 1, 0).numpy()


def value_and_vjp(function, cotangent, *inputs):
    """The function's value, and the gradients of `(value * cotangent).sum()`; one compilation."""

    @jit
    def run(cotangent, *inputs):
        value, vjp = jax.vjp(function, *inputs)
        return value, *vjp(cotangent)

    return run(cotangent, *inputs)


def compare(close, ours, theirs, *inputs) -> None:
    """Compares outputs and gradients of two functions; `inputs` are NHWC maps, for `theirs` turned to NCHW."""
    tensors = [nchw(x).requires_grad_() for x in inputs]
    expected = theirs(*tensors)
    cotangent = random_images(nhwc(expected).shape, 99, inputs[0].dtype)
    expected.backward(nchw(cotangent))
    found, *gradients = value_and_vjp(ours, cotangent, *inputs)
    close(found, nhwc(expected))
    for gradient, tensor in zip(gradients, tensors, strict=True):
        close(gradient, nhwc(tensor.grad), "gradient")


# kernel size, options
CONVOLUTIONS = [
    (1, {}),
    (1, {"strides": 2}),
    (1, {"strides": 3, "groups": 2}),
    (1, {"padding": 1}),
    (3, {"padding": 1}),
    (3, {"padding": 1, "strides": 2}),
    (3, {"padding": 2, "dilation": 2}),
    (3, {"padding": 4, "dilation": 4, "strides": 2}),
    (3, {"padding": 1, "groups": 2}),
    (3, {"padding": 1, "groups": 6, "strides": 2}),
    (5, {"padding": 2}),
    (7, {"padding": 3, "strides": 2}),
    (2, {"strides": 2}),
]


@pytest.mark.parametrize(("size", "options"), CONVOLUTIONS, ids=str)
def test_conv(close, precision, size, options):
    x = random_images((2, 11, 14, 6), 0, precision)
    groups = options.get("groups", 1)
    kernel = np.random.default_rng(1).standard_normal((size, size, 6 // groups, 12)).astype(precision)
    theirs = {"stride" if key == "strides" else key: value for key, value in options.items()}
    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous().requires_grad_()
    compare(
        close,
        lambda x: F.conv(x, jnp.asarray(kernel), **options),
        lambda x: T.conv2d(x, weight, **theirs),
        x,
    )
    expected = T.conv2d(nchw(x), weight.detach(), **theirs)
    cotangent = random_images(nhwc(expected).shape, 99, precision)
    _, gradient = value_and_vjp(lambda kernel: F.conv(jnp.asarray(x), kernel, **options), cotangent, kernel)
    close(gradient, hwio(weight.grad), "gradient of the kernel")


# window, strides, padding
WINDOWS = [(1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 4, 0), (3, 3, 0), (2, 3, 1), (4, 2, 2), (5, 1, 2)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize(("window", "strides", "padding"), WINDOWS)
def test_avg_pool(close, window, strides, padding, count_include_pad, ceil_mode):
    rule = {"padding": padding, "count_include_pad": count_include_pad, "ceil_mode": ceil_mode}
    for size in [(7, 14), (8, 13), (5, 6), (9, 4)]:
        compare(
            close,
            lambda x: F.avg_pool(x, window, strides, **rule),
            lambda x: T.avg_pool2d(x, window, strides, **rule),
            random_images((2, *size, 3), 0),
        )


@pytest.mark.parametrize(("window", "strides", "padding"), [(2, 2, 0), (3, 3, 0), (3, 2, 0), (4, 3, 1)])
def test_avg_pool_of_a_map_smaller_than_the_window(close, precision, window, strides, padding):
    """In ceiling mode PyTorch has an output there: the average of what there is."""
    rule = {"padding": padding, "count_include_pad": False, "ceil_mode": True}
    smallest = max(window - 2 * padding - strides + 1, 1)
    for size in [(smallest, smallest), (smallest, 5)]:
        compare(
            close,
            lambda x: F.avg_pool(x, window, strides, **rule),
            lambda x: T.avg_pool2d(x, window, strides, **rule),
            random_images((2, *size, 3), 0, precision),
        )


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_avg_pool_steps_by_its_window_where_no_stride_is_given(close, precision, window):
    x = random_images((1, 7, 14, 3), 0, precision)
    compare(close, lambda x: F.avg_pool(x, window), lambda x: T.avg_pool2d(x, window), x)


@pytest.mark.parametrize(("window", "strides", "padding"), [(3, 2, 1), (2, 2, 0), (2, 2, 1), (3, 1, 1), (5, 3, 2)])
@pytest.mark.parametrize("size", [(7, 14), (8, 13), (5, 6)])
def test_max_pool(close, precision, window, strides, padding, size):
    x = random_images((2, *size, 3), 0, precision) - 5  # nearly all negative: padding with zeros would win
    compare(
        close,
        lambda x: F.max_pool(x, window, strides, padding=padding),
        lambda x: T.max_pool2d(x, window, strides, padding=padding),
        x,
    )


def test_global_avg_pool(close, precision):
    x = random_images((2, 7, 14, 3), 0, precision)
    close(F.global_avg_pool(jnp.asarray(x)), nchw(x).mean(dim=(2, 3)).numpy())


def nearest_source(size: int, output: int) -> np.ndarray:
    """What PyTorch copies into each output position. It computes in float32: `floor(i * float32(size / output))`."""
    x = torch.arange(size, dtype=torch.float32)[None, None, :, None]
    return T.interpolate(x, size=(output, 1), mode="nearest")[0, 0, :, 0].numpy().astype(int)


def assert_copies_as_pytorch(pairs: list[tuple[int, int]]) -> None:
    """Resizes a line of numbered pixels for each (size, output), two pairs at a time: one along each axis."""
    pairs = pairs + pairs[-1:] * (len(pairs) % 2)
    quads = [(*rows, *columns) for rows, columns in zip(pairs[::2], pairs[1::2], strict=True)]
    maps = [1000.0 * jnp.arange(h)[None, :, None, None] + jnp.arange(w)[None, None, :, None] for h, _, w, _ in quads]

    @jit
    def resize(maps):
        return [F.resize_nearest(x, (p, q))[0, :, :, 0] for x, (_, p, _, q) in zip(maps, quads, strict=True)]

    for found, (h, p, w, q) in zip(resize(maps), quads, strict=True):
        expected = np.add.outer(1000 * nearest_source(h, p), nearest_source(w, q))
        np.testing.assert_array_equal(found, expected, err_msg=f"{h} → {p}, {w} → {q}")


def assert_sources_of_pytorch(pairs: list[tuple[int, int]]) -> None:
    for size, output in pairs:
        np.testing.assert_array_equal(source_pixels(size, output), nearest_source(size, output), err_msg=f"{size} → {output}")


def test_resize_nearest_has_the_sources_of_pytorch():
    assert_sources_of_pytorch([(size, output) for size in range(1, 65) for output in range(1, 65)])


@pytest.mark.parametrize("pooling", [2, 3, 4, 8])
def test_resize_nearest_undoes_each_pooling_as_pytorch_does(pooling):
    assert_sources_of_pytorch([(n // pooling, n) for n in [*range(pooling, 64 * pooling), 193, 224, 299, 350]])


@pytest.mark.usefixtures("x64")  # compiles faster
def test_resize_nearest_copies_from_its_sources():
    sizes = (1, 2, 5, 7, 14, 30)
    assert_copies_as_pytorch([(size, output) for size in sizes for output in (1, 2, 7, 11, 29, 56)])


# Where float32 falls short of a whole number, in multiples of the size, in other sizes, and beyond the sizes above.
@pytest.mark.parametrize(("size", "output"), [(2, 82), (2, 94), (3, 123), (14, 46), (24, 74), (26, 22), (64, 194)])
def test_resize_nearest_rounds_as_pytorch_does(size, output):
    assert not np.array_equal(nearest_source(size, output), np.arange(output) * size // output)
    assert_copies_as_pytorch([(size, output)])


@pytest.mark.parametrize(("size", "output"), [((3, 2), (14, 8)), ((7, 3), (30, 14)), ((5, 9), (3, 9)), ((4, 4), (16, 16))])
def test_resize_nearest_gradient(close, precision, size, output):
    x = random_images((2, *size, 3), 0, precision)
    compare(close, lambda x: F.resize_nearest(x, output), lambda x: T.interpolate(x, size=output, mode="nearest"), x)


def conv_norm(sequence: torch.nn.Sequential, strides: int = 1):
    """The oracle's last two layers, convolution and BatchNorm in evaluation, as a function of an array."""
    convolution, norm = sequence[-2:]
    kernel = jnp.asarray(hwio(convolution.weight))
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    offset = (norm.bias - norm.running_mean * factor).detach()

    def apply(x):
        y = F.conv(x, kernel, strides=strides, padding=1)
        return y * jnp.asarray(factor.numpy())[None, None, None] + jnp.asarray(offset.numpy())[None, None, None]

    return apply


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "strides"), [((7, 7), 1), ((14, 9), 2), ((30, 17), 1)])
@pytest.mark.parametrize("pooling", [2, 3, 4])
def test_self_calibration(close, size, strides, pooling):
    oracle = randomise(SelfCalibration(6, strides, pooling=pooling), 0).double().eval()
    k2, k3, k4 = conv_norm(oracle.k2), conv_norm(oracle.k3), conv_norm(oracle.k4, strides)
    x = random_images((2, *size, 6), 1)
    compare(close, lambda x: F.self_calibration(x, k2, k3, k4, pooling=pooling), oracle, x)


@pytest.mark.parametrize("strides", [1, 2])
def test_self_calibrated_conv(close, precision, strides):
    oracle = randomise(SelfCalibratedConv(12, strides), 0).to(torch_dtype(precision)).eval()
    branch = oracle.scconv
    k1, k2, k3, k4 = (
        conv_norm(oracle.k1, strides),
        conv_norm(branch.k2),
        conv_norm(branch.k3),
        conv_norm(branch.k4, strides),
    )
    x = random_images((2, 14, 9, 12), 1, precision)
    compare(close, lambda x: F.self_calibrated_conv(x, k1, k2, k3, k4), oracle, x)
