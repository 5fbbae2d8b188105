"""What `fuse` refuses, and files of fused variables."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax.layers import BatchNorm, Conv, SelfCalibratedConv
from tests.fusion.test_fuse import maps, random_variables

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@functools.cache
def network(**options):
    return scconv_jax.create_model("resnet20_small", planes=(32, 32, 32), **options).clone(stage_sizes=(1, 1, 1))


@pytest.fixture(scope="module")
def variables():
    return random_variables(network(), IMAGES)


@pytest.fixture(scope="module")
def fused(variables):
    return scconv_jax.fuse(network(), variables)


def changed(variables, path, value):
    """Returns variables with another leaf at a path, or without it if the value is None."""
    first, *rest = path.split("/")
    new = dict(variables)
    if rest:
        new[first] = changed(variables.get(first, {}), "/".join(rest), value)
    elif value is None:
        del new[first]
    else:
        new[first] = value
    return new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"params": v["params"]}, r"They have no batch_stats: give the running statistics"),
        (lambda v: changed(v, "params/bn1/scale", None), r"Missing: params/bn1/scale\. Give the variables of this network"),
        (
            lambda v: changed(changed(v, "params/fc", None), "params/fcc", v["params"]["fc"]),
            r"Missing: params/fc/\w+, params/fc/\w+\. Not in the network: params/fcc/\w+, .* Did you mean 'params/fc/",
        ),
        (
            lambda v: changed(v, "params/fc", {"kernel": np.zeros((128, 7), np.float32), "bias": np.zeros(7)}),
            r"Other shapes: .*params/fc/kernel \(128, 7\) where it has \(128, 10\).*num_classes for the last layer, params/fc",
        ),
        (lambda v: SimpleNamespace(**v, opt_state=()), "SimpleNamespace, the state of a network in training. Give {.params"),
        (lambda _: [1], r'takes variables {"params": ..., "batch_stats": ...}, as `model.init` returns them; got list'),
        (
            lambda _: {"conv1.weight": np.zeros(3)},
            r"got conv1\.weight\. Convert a PyTorch state dict with scconv_jax\.from_torch",
        ),
        (lambda v: changed(v, "params/fc/bias", "text"), "leaves are arrays"),
    ],
)
def test_variables_that_do_not_fit(variables, change, message):
    with pytest.raises(ValueError, match=message):
        scconv_jax.fuse(network(), change(variables))


def test_what_is_no_network_or_fused_already(variables, fused):
    with pytest.raises(ValueError, match=r"fuse takes a flax\.linen\.Module and its variables; got str"):
        scconv_jax.fuse("resnet50", variables)
    with pytest.raises(ValueError, match=r"give the module itself, not `model\.bind\(variables\)`"):
        scconv_jax.fuse(network().bind(variables), variables)
    with pytest.raises(ValueError, match="The network is fused already"):
        scconv_jax.fuse(*fused)
    with pytest.raises(ValueError, match=r"The variables are fused already. Give those of the original network"):
        scconv_jax.fuse(network(), fused[1])


def test_a_fused_network_cannot_train(fused):
    model, variables = fused
    with pytest.raises(
        ValueError, match=r"ResNet is fused for inference and cannot train: call it with train=False. Train the network"
    ):
        model.apply(variables, maps(2, 32, 32, 3), train=True, mutable=["batch_stats"])


class Scale(nn.Module):
    """A norm of a user."""

    dtype: object = None

    @nn.compact
    def __call__(self, x, *, train):
        """Return a multiple of the input."""
        del train
        return x * self.param("scale", nn.initializers.ones, (1, 1, 1, x.shape[-1]))


class Own(nn.Module):
    """A network of a user with a norm of its choice."""

    norm_class: type = BatchNorm
    always: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        """Return maps."""
        x = Conv(8, 3)(x)
        if self.norm_class is BatchNorm:
            return BatchNorm(name="norm")(x, train=train or self.always)
        return self.norm_class(use_running_average=not train, name="norm")(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Own(nn.BatchNorm), "norm: the norm BatchNorm cannot be folded"),
        (
            SelfCalibratedConv(8, norm=functools.partial(Scale)),
            r"The layer: the norm Scale cannot be folded into a convolution; only scconv_jax\.layers\.BatchNorm can",
        ),
        (
            Own(always=True),
            r"norm normalises by the batch's statistics \(train=True\) even in inference: the network is in training",
        ),
    ],
)
def test_norms_that_cannot_be_folded(model, message):
    x = jnp.zeros((2, 8, 8, 8))
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    with pytest.raises(ValueError, match=message):
        scconv_jax.fuse(model, variables, x)


def test_an_input_that_cannot_be_found_is_asked_for():
    class Picky(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            if x.shape[1:3] != (9, 5):
                raise ValueError("only 9×5")
            return BatchNorm()(Conv(4, 1)(x), train=train)

    x = jnp.zeros((1, 9, 5, 2))
    variables = Picky().init(jax.random.key(0), x, train=False)
    with pytest.raises(
        ValueError, match=r"No input was found that the network accepts \(only 9×5\)\. Give one: fuse\(model, var"
    ):
        scconv_jax.fuse(Picky(), variables)
    assert set(scconv_jax.fuse(Picky(), variables, x)[1]["params"]["Conv_0"]) == {"kernel", "offset"}


def test_fused_variables_are_saved_and_loaded(tmp_path, fused):
    model = scconv_jax.create_model("scconv_resnet20_small", num_classes=3)
    x = maps(1, 32, 32, 3)
    fast, new = scconv_jax.fuse(model, random_variables(model, x))
    path = tmp_path / "fused.safetensors"
    scconv_jax.save(path, new, {"model": "scconv_resnet20_small", "arguments": {"num_classes": 3, "fused": True}})
    loaded, again = scconv_jax.load_model(path)
    jax.tree.map(np.testing.assert_array_equal, again, new)
    assert loaded == fast
    again = jax.tree.map(jnp.asarray, again)
    np.testing.assert_array_equal(loaded.apply(again, x, train=False), fast.apply(new, x, train=False))
    assert scconv_jax.load_run(path).model == fast

    with pytest.raises(ValueError, match=r"fused\.safetensors does not fit resnet20_small in its fused form\. Missing: "):
        scconv_jax.load_model(path, "resnet20_small")
    with pytest.raises(ValueError, match=r"holds fused variables, which only load_model and load_run accept. Use the file"):
        scconv_jax.load_weights(path, random_variables(model, x))
    bare = tmp_path / "bare.safetensors"
    scconv_jax.save(bare, fused[1])
    with pytest.raises(
        ValueError, match=r"holds fused variables, which do not show their network. Give its name as the model, or save"
    ):
        scconv_jax.load_model(bare)
    assert json.loads(json.dumps(scconv_jax.load(bare).metadata)) == {}


def test_fused_variables_have_no_pytorch_keys(tmp_path, fused):
    message = (
        r"No rule converts the leaf params/.*\. The variables are fused: convert those that were given to scconv_jax\.fuse\."
    )
    with pytest.raises(scconv_jax.ConversionError, match=message):
        scconv_jax.to_torch(fused[1])
    with pytest.raises(scconv_jax.ConversionError, match=message):
        scconv_jax.save(tmp_path / "fused.pth", fused[1])
    assert not list(tmp_path.iterdir())
