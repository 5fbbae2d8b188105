"""How layers are constructed: habits of Flax, NNX and PyTorch, values out of range, dtypes and initial values of parameters."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax import CRU, SRU, GhostConv, ScConv, SelfCalibratedConv, SelfCalibration, layers

pytestmark = pytest.mark.usefixtures("unchecked")
OPERATORS = [ScConv, SelfCalibratedConv, SelfCalibration, CRU, SRU, GhostConv]
X = jnp.ones((1, 8, 8, 16))


@pytest.mark.parametrize("layer", OPERATORS)
def test_only_features_may_be_given_by_position(layer):
    by_position = [p.name for p in inspect.signature(layer).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = {SRU: [], GhostConv: ["features", "kernel_size"]}  # as in flax.linen.Conv
    assert by_position == expected.get(layer, ["features"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ScConv(32, 3),
            "ScConv(32, 3): only features can be given by position. Write ScConv(32, kernel_size=3) or ScConv(32, strides=3).",
        ),
        (
            lambda: SelfCalibratedConv(16, 3),
            "Write SelfCalibratedConv(16, strides=3). K1 to K4 are 3×3 convolutions: leave kernel_size out.",
        ),
        (lambda: SelfCalibration(16, (3, 3)), "SelfCalibration(16, (3, 3)): only features can be given by position."),
        (
            lambda: GhostConv(16, 3, 2),
            "only features and kernel_size can be given by position. Write GhostConv(16, 3, strides=2).",
        ),
        (lambda: SRU(32), "SRU(32): no option can be given by position, as in SRU(dtype=...). The input tells its channels."),
        (lambda: ScConv(32, stride=2), "ScConv has no option 'stride'. Use strides. Its options: "),
        (lambda: ScConv(32, feature_group_count=2), "no option 'feature_group_count'. Use conv_groups."),
        (lambda: SelfCalibratedConv(16, feature_group_count=2), "no option 'feature_group_count'. Use groups."),
        (lambda: SelfCalibratedConv(16, kernel_dilation=2), "no option 'kernel_dilation'. Use dilation."),
        (lambda: SelfCalibratedConv(16, kernel_size=(3, 3)), "no option 'kernel_size'. K1 to K4 are 3×3 convolutions"),
        (lambda: ScConv(32, padding="SAME"), "The layer pads so that stride 1 keeps height and width: leave it out."),
        (lambda: ScConv(32, use_bias=False), "The layer has the biases of its reference implementation: leave it out."),
        (lambda: ScConv(in_features=16), "The channels of the input are read from the input: leave it out."),
        (lambda: ScConv(32, rngs=0), "in NNX, wrap it: flax.nnx.bridge.ToNNX(layer, rngs=rngs)."),
        (lambda: SelfCalibratedConv(16, train=True), "Say it in the call: layer(x, train=True)."),
        (lambda: CRU(strides=2), "The unit keeps the size of the map; ScConv(strides=...) pools before it."),
        (lambda: ScConv(op_channel=16), "no option 'op_channel'. Use features."),
        (lambda: SRU(group_num=4), "no option 'group_num'. Use groups."),
        (lambda: ScConv(32, activation="relu"), "apply it to the result, flax.linen.relu(layer(x))."),
        (lambda: SelfCalibratedConv(16, axis_name="batch"), "Give it to the norm: norm=functools.partial("),
        (lambda: ScConv(strids=2), "ScConv has no option 'strids'. Did you mean 'strides'?"),
    ],
)
def test_habits_of_other_libraries_are_answered(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfCalibratedConv(15), "15 is odd. Use 14 or 16 channels."),
        (lambda: SelfCalibratedConv(1), "1 is odd. Use 2 channels."),
        (lambda: SelfCalibratedConv(16, norm="batch"), "norm='batch' must be the class of a module"),
        (lambda: ScConv(threshold="half"), "threshold='half' must be a number."),
        (lambda: SRU(epsilon=-1), "epsilon=-1 must be 0 or a positive number. Nearest valid value: 0."),
        (lambda: layers.BatchNorm(momentum=-1), "momentum=-1 must be a number from 0 to 1. Nearest valid value: 0."),
        (lambda: layers.Conv(8, 3, use_bias="no"), "use_bias='no' must be True or False."),
        (lambda: layers.SqueezeExcitation(0), "hidden=0 must be one positive integer. Nearest valid value: 1."),
        (lambda: ScConv("16"), "features='16' must be one positive integer. Nearest valid value: 16."),
        (lambda: SelfCalibratedConv(True), "features=True must be one positive integer."),
        (lambda: SelfCalibratedConv(16, groups=3), "groups=3 must divide the channels of input and output, 8 and 8."),
        (
            lambda: SelfCalibratedConv(16, strides=(2, 1)),
            "strides=(2, 1) must be the same for height and width: use strides=2 or",
        ),
        (lambda: SelfCalibratedConv(16, dilation=0), "dilation=0 must be one positive integer."),
        (lambda: SelfCalibration(16, pooling=-1), "pooling=-1 must be one positive integer."),
        (lambda: ScConv(kernel_size=4), "kernel_size=4 must be odd, so that the kernel has a centre. Use 3 or 5."),
        (lambda: ScConv(gate="sharp"), "Unknown gate 'sharp'."),
        (lambda: GhostConv(16, 2), "kernel_size=2 must be odd"),
        (lambda: ScConv(param_dtype=int), "param_dtype=<class 'int'> is not a floating-point dtype. Use jnp.float32"),
        (lambda: ScConv(dtype="floaty"), "dtype='floaty' is not a floating-point dtype."),
        (lambda: ScConv(kernel_init="he"), "kernel_init='he' must be a function (key, shape, dtype) → array"),
        (
            lambda: layers.Conv(8, 3, padding="SAME"),
            "padding='SAME' must be one number, the zeros on each side, as in PyTorch: padding=1",
        ),
        (lambda: layers.Conv(8, 5, dilation=2, padding="VALID"), 'padding=4 keeps the size at stride 1, padding=0 is "VALID".'),
    ],
)
def test_values_out_of_range_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_pair_of_equal_numbers_is_one_number():
    assert ScConv(16, strides=(2, 2), kernel_size=(5, 5)) == ScConv(16, strides=2, kernel_size=5)
    assert SelfCalibratedConv(16, strides=[2, 2], dilation=(1, 1)) == SelfCalibratedConv(16, strides=2)
    assert layers.Conv(8, (3, 3), padding=(1, 1)) == layers.Conv(8, 3, padding=1)


@pytest.mark.parametrize(
    "layer", [ScConv(32), SelfCalibratedConv(16), GhostConv(8, norm=layers.BatchNorm)], ids=lambda m: type(m).__name__
)
def test_param_dtype_and_kernel_init_reach_every_parameter(layer):
    def initial(layer):
        return layer.init(jax.random.key(0), X, train=False)

    plain, half = initial(layer), initial(layer.clone(param_dtype=jnp.bfloat16, kernel_init=nn.initializers.ones))
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plain)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.get("batch_stats", {}))} <= {"float32"}
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(half) if path[-1].key == "kernel"]
    assert kernels
    assert all((kernel == 1).all() for kernel in kernels)


def test_a_layer_follows_the_layers_around_it_but_no_other_module():
    class Mine(nn.Module):
        param_dtype: object = jnp.bfloat16  # of a user's own module, for its own layers

        @nn.compact
        def __call__(self, x):
            return ScConv(kernel_init=nn.initializers.zeros)(x)

    params = Mine().init(jax.random.key(0), X)["params"]["ScConv_0"]
    assert params["CRU"]["GWC"]["kernel"].dtype == jnp.float32
    assert not params["CRU"]["GWC"]["kernel"].any()


def test_a_layer_of_ones_own_may_use_the_names_of_checked_attributes_for_other_things():
    class Scaled(layers.Layer):
        width: float = 0.5
        block: str = "mine"

    assert (Scaled().width, Scaled(block="x").block) == (0.5, "x")


def test_calibration_without_norms():
    layer = SelfCalibratedConv(16, norm=None)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), X, train=False))
    assert set(shapes) == {"params"}


def test_the_layers_are_public():
    for layer in OPERATORS:
        assert getattr(scconv_jax, layer.__name__) is getattr(layers, layer.__name__) is layer
        assert issubclass(layer, layers.Layer)
