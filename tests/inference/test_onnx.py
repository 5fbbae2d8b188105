"""`to_onnx`: every operator, layer and family in ONNX Runtime, with fixed and with open sizes."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import export, lax

import scconv_jax
from scconv_jax import functional as F
from scconv_jax.inference.export_check import ExportError, compare, image_sizes
from scconv_jax.inference.onnx_conversion import to_onnx
from scconv_jax.inference.onnx_graph import Graph
from scconv_jax.layers.core import BatchNorm
from tests.functional.test_symbolic import CHANNELS, LAYERS, OPERATORS, SIZES, kernel, maps
from tests.models.test_symbolic_sizes import FAMILIES, SHORT

FIXED_ONLY = {  # other forms than with open sizes
    "avg_pool, ceiling and a rest": partial(F.avg_pool, window=3, strides=2, ceil_mode=True, count_include_pad=False),
    "avg_pool, ceiling with pads": partial(F.avg_pool, window=3, strides=2, padding=1, ceil_mode=True),
    "resize_nearest, smaller": lambda x: F.resize_nearest(x, (7, 13)),
    "resize_nearest, unequal repeats": lambda x: F.resize_nearest(F.avg_pool(x, 5), x.shape[1:3]),
    "resize_nearest, where float32 rounds down": lambda x: F.resize_nearest(x[:, :24, :24], (74, 74)),
    "conv, 32 groups": partial(F.conv, kernel=kernel(3, 3, 1, 2 * CHANNELS), padding=1, groups=CHANNELS),
    "conv, no padding": partial(F.conv, kernel=kernel(3, 2, CHANNELS, 4)),
    "softmax and transposes": lambda x: jax.nn.softmax(x, axis=2).transpose(0, 3, 1, 2),
    "sums over some axes": lambda x: (x.sum(1), x.sum((0, 3)), x.mean(2, keepdims=True), x.max((1, 3))),
    "pads": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3), (1, 0)), constant_values=2.0),
    "reshapes": lambda x: (x.reshape(x.shape[0], -1), x.reshape(-1, 8), x.reshape(x.shape[0], -1, x.shape[2], 4, 8)),
    "repeats": lambda x: (jnp.repeat(x, 3, axis=3), jnp.tile(x, (1, 1, 2, 1))),
    "indices": lambda x: (x[:, ::-1, 1:-1:2], x[..., 3], jnp.take(x, np.array([3, 1, 1]), axis=3)),
    "activations": lambda x: (
        jax.nn.relu6(x),
        jax.nn.hard_swish(x),
        jax.nn.sigmoid(x),
        jnp.tanh(x),
        x**3,
        lax.rsqrt(x**2 + 1),
        jnp.round(x),
    ),
    "choices": lambda x: (jnp.where((x > 0) & ~(x >= 1), x, -x), jnp.clip(x, -0.5, 0.5), (x != x).astype(x.dtype)),
    "constant maps": lambda x: jnp.concatenate([x, jnp.ones_like(x)], axis=3) + jnp.arange(2.0 * CHANNELS),
}


def session(model):
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def check(function, *symbolic, sizes=SIZES[:1], gates=0):
    """Convert a function of maps once, and compare it with JAX at each size.

    Up to `gates` gates of ScConv may lie within rounding of their threshold. Each makes two values jump.
    """
    shape = (*symbolic, CHANNELS) if symbolic else maps(sizes[0]).shape
    run = session(to_onnx(function, jax.ShapeDtypeStruct(shape, jnp.float32), inputs=["x"]))
    with jax.numpy_rank_promotion("allow"):
        for size in sizes:
            x = maps(size)
            expected = jax.tree.leaves(jax.jit(function)(x))
            found = run.run(None, {"x": np.asarray(x)})
            assert [value.shape for value in found] == [value.shape for value in expected]
            for ours, theirs in zip(found, expected, strict=True):
                differs = np.abs(ours - theirs) > 1e-5 * max(1, np.abs(theirs).max())
                assert differs.sum() <= 2 * gates, f"{differs.sum()} of {differs.size} values"


@pytest.mark.parametrize("name", [*OPERATORS, *FIXED_ONLY])
def test_operators(name):
    with jax.numpy_rank_promotion("allow"):
        check((OPERATORS | FIXED_ONLY)[name])


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_with_open_sizes(name):
    check(OPERATORS[name], *export.symbolic_shape("n, 32*h, 32*w"), sizes=SIZES)


def test_constant_maps_of_open_sizes():
    """They cannot be folded, so their operations are written."""

    def function(x):
        ramp = jnp.broadcast_to(jnp.arange(1.0 * CHANNELS), x.shape)
        return x + jnp.exp(-ramp[:, ::-1]).transpose(0, 2, 1, 3).sum(2)[:, None], ramp.reshape(*x.shape[:3], 2, -1)

    with jax.numpy_rank_promotion("allow"):
        check(function, *export.symbolic_shape("n, 32*h, 32*w"), sizes=SIZES)


def random_variables(model, shape):
    """Return variables as after training: norms of random statistics, scales and offsets, and kernels that keep the scale."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        normal = rng.standard_normal(leaf.shape)
        if path[-1].key in ("var", "scale", "gamma"):
            return np.exp(0.2 * normal).astype(np.float32)
        if path[-1].key == "kernel":
            return (normal * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        return (0.3 * normal).astype(np.float32)

    options = {} if type(model).__name__ == "SqueezeExcitation" else {"train": False}
    template = jax.eval_shape(partial(model.init, **options), jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(jnp.asarray, jax.tree.map_with_path(draw, template))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer = LAYERS[name]
    options = {} if name == "SqueezeExcitation" else {"train": False}
    function = partial(layer.apply, random_variables(layer, (2, 32, 32, CHANNELS)), **options)
    gates = 2 if name.startswith("ScConv") else 0
    check(function, gates=gates)
    check(function, *export.symbolic_shape("n, 32*h, 32*w"), sizes=SIZES, gates=gates)


def check_network(name, model, size, **options):
    sizes = image_sizes(name, model, "dynamic", size)
    variables = random_variables(model, sizes.samples()[0])
    images = jax.ShapeDtypeStruct(sizes.shape(), jnp.float32)
    run = session(to_onnx(partial(model.apply, variables, train=False), images, **options))
    return compare(lambda x: run.run(None, {"images": x})[0], model, variables, sizes, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(33, 47), "dynamic"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, size):
    model = scconv_jax.create_model(name).clone(**FAMILIES[name])
    assert check_network(name, model, size).difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_every_network(name):
    """With random weights, a gate of ScConv may lie within rounding of its threshold; `compare` measures that."""
    check_network(name, SHORT[name], (min(SHORT[name].image_size, 97),) * 2)


def test_a_converted_norm_is_part_of_constants():
    """A convolution, a multiplication, an addition: what depends on the norm's variables alone is computed."""
    layer = scconv_jax.layers.ConvNorm(8, relu=True)
    variables = random_variables(layer, (1, 8, 8, 4))
    model = to_onnx(partial(layer.apply, variables, train=False), jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32))
    operations = [node.op_type for node in model.graph.node]
    assert operations == ["Transpose", "Conv", "Mul", "Add", "Relu", "Transpose", "Identity"]


def test_constants_are_shared_only_if_they_are_equal():
    """Also if the array of an earlier one is gone, and its memory is used again."""
    graph = Graph()
    names = [graph.constant(np.full((64, 64), number % 10, np.float32)) for number in range(20)]
    assert names[:10] == names[10:]
    assert len({*names}) == len(graph.constants) == 10


def test_names_of_inputs_outputs_and_metadata():
    model = scconv_jax.create_model("scnet20_small").clone(stage_sizes=(1,), planes=(16,), output_stride=1)
    variables = random_variables(model, (1, 32, 32, 3))
    function = partial(model.apply, variables, train=False, method="features")
    shape = export.symbolic_shape("n, 32, 32, 3")
    written = to_onnx(function, jax.ShapeDtypeStruct(shape, jnp.float32), metadata={"model": "mine"}, channels_first=True)
    run = session(written)
    assert run.get_inputs()[0].shape == ["n", 3, 32, 32]
    assert [(value.name, value.shape) for value in run.get_outputs()] == [("layer1", ["n", 32, 32, 64])]
    assert run.get_modelmeta().custom_metadata_map == {"model": "mine"}
    assert any(node.name.endswith("layer1/0/k1/0/Conv") for node in written.graph.node)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    found = run.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(found, jax.jit(function)(images)["layer1"], atol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: lax.round(x), "of rounding halves away from zero"),
        (lambda x: jnp.cumsum(x, axis=3), r"The operation cumsum has no counterpart in ONNX here\. Export it as StableHLO"),
        (
            lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 2), (1, 1, 1, 1), "VALID"),
            "windows over other axes than height",
        ),
        (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))), "of padding between elements"),
        (lambda x: lax.conv_transpose(x, jnp.ones((2, 2, 4, 4)), (2, 2), "VALID"), "a transposed convolution"),
        (lambda x: jnp.einsum("nhwc,nhwd->ncd", x, x), "a product of batches of matrices"),
    ],
)
def test_unsupported_operations_are_named(function, message):
    with pytest.raises(ExportError, match=message):
        to_onnx(function, jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the package onnx: pip install 'scconv-jax\[export\]'"):
        to_onnx(lambda x: x, jax.ShapeDtypeStruct((1,), jnp.float32))


def test_a_norm_in_training_mode():
    """The statistics of a batch: sums, and a division by the open number of values."""
    layer = BatchNorm()
    variables = random_variables(layer, (2, 32, 32, CHANNELS))
    check(
        lambda x: layer.apply(variables, x, train=True, mutable=["batch_stats"])[0],
        *export.symbolic_shape("n, 32*h, 32*w", constraints=["n >= 2"]),
    )
