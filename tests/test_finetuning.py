"""Another head, and frozen parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import scconv_jax
from scconv_jax.models import BasicBlock, ResNet

MODEL = ResNet(BasicBlock, (1, 1), planes=(4, 8), output_stride=8, num_classes=3)
X = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda key: MODEL.init(key, X, train=False))(jax.random.key(0))


def without_head(variables):
    return {**variables, "params": {name: leaves for name, leaves in variables["params"].items() if name != "fc"}}


def test_another_head(variables):
    model, new = scconv_jax.reset_classifier(MODEL, variables, 7, jax.random.key(1))
    assert model.num_classes == 7
    assert new["params"]["fc"]["kernel"].shape == (8, 7)
    jax.tree.map(np.testing.assert_array_equal, without_head(new), without_head(variables))
    assert model.apply(new, X, train=False).shape == (4, 7)
    _, other = scconv_jax.reset_classifier(MODEL, variables, 7)
    assert (other["params"]["fc"]["kernel"] != new["params"]["fc"]["kernel"]).any()
    bound = 8**-0.5  # PyTorch's initial values
    assert 0.5 * bound < jnp.abs(new["params"]["fc"]["kernel"]).max() <= bound


def test_no_head_and_a_head_again(variables):
    model, bare = scconv_jax.reset_classifier(MODEL, variables, 0)
    assert "fc" not in bare["params"]
    pooled = MODEL.apply(variables, X, train=False, method="pooled")
    np.testing.assert_array_equal(model.apply(bare, X, train=False), pooled)
    model, again = scconv_jax.reset_classifier(model, bare, 3)
    assert model == MODEL
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)


def test_the_new_head_has_the_parameters_dtype(variables):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    _, new = scconv_jax.reset_classifier(MODEL, half, 5)
    assert new["params"]["fc"]["kernel"].dtype == jnp.bfloat16


def test_what_resetting_refuses(variables):
    with pytest.raises(ValueError, match=re.escape("num_classes=-1 must be 0, for no head, or a positive integer.")):
        scconv_jax.reset_classifier(MODEL, variables, -1)
    with pytest.raises(ValueError, match="The variables are of another network than ResNet: they have no layer2"):
        scconv_jax.reset_classifier(MODEL, {"params": {"conv1": {}, "bn1": {}, "layer1": {}}}, 2)
    with pytest.raises(ValueError, match=re.escape("Variables are {'params': ..., 'batch_stats': ...}; got bn1, conv1, fc, ")):
        scconv_jax.reset_classifier(MODEL, variables["params"], 2)
    with pytest.raises(TypeError, match=re.escape("takes a network of this library; got str. Use create_model('resnet50').")):
        scconv_jax.reset_classifier("resnet50", variables, 2)


def test_a_seed_serves_as_key(variables):
    first, second = (scconv_jax.reset_classifier(MODEL, variables, 2, key)[1] for key in (1, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["stem"], {"conv1", "bn1"}),
        (("stem", "layer1", "head"), {"conv1", "bn1", "layer1", "fc"}),
        (["layer1/0/conv1"], {"layer1/0/conv1"}),
        (["*/bn1", "bn1"], {"bn1", "layer1/0/bn1", "layer2/0/bn1"}),
        ([], set()),
    ],
)
def test_the_mask_covers_what_was_named(variables, names, expected):
    mask = flatten_dict(scconv_jax.frozen_mask(MODEL, variables["params"], names), sep="/")
    assert set(mask) == set(flatten_dict(variables["params"], sep="/"))
    assert {path for path, frozen in mask.items() if frozen} == {
        path for path in mask if any(path.startswith(f"{module}/") for module in expected)
    }


def test_single_parameters_by_pattern(variables):
    mask = flatten_dict(scconv_jax.frozen_mask(MODEL, variables["params"], ["*/bias"]), sep="/")
    assert {path for path, frozen in mask.items() if frozen} == {path for path in mask if path.endswith("/bias")}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layr1"], "No parameter is in 'layr1'. Did you mean 'layer1' or"),
        (["layer1/7"], "No parameter is in 'layer1/7'."),
        ("stem", "names='stem' must be a sequence of names: give ['stem']."),
        ([3], "names=[3] must be a sequence of names: give ['stem', 'layer1']."),
        (["*"], "*: every parameter is frozen; leave out one stage, such as head."),
    ],
)
def test_names_that_the_mask_refuses(variables, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scconv_jax.frozen_mask(MODEL, variables["params"], names)


def test_the_mask_is_of_parameters(variables):
    with pytest.raises(ValueError, match=re.escape("params are variables: give variables['params'].")):
        scconv_jax.frozen_mask(MODEL, variables, ["stem"])


def test_frozen_stages_stay_as_they_are(variables):
    """Parameters under weight decay and momentum, and statistics, bit for bit; the rest moves."""
    model = MODEL.clone(frozen=("stem", "layer1"))
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    optimizer = optax.selective_transform(optimizer, freeze_mask=scconv_jax.frozen_mask(model, variables["params"]))

    def step(variables, state):
        def loss_of(params):
            y, new = model.apply({**variables, "params": params}, X, train=True, mutable=["batch_stats"])
            return jnp.square(y).mean(), new

        gradients, new = jax.grad(loss_of, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    after, state = variables, optimizer.init(variables["params"])
    for _ in range(2):
        after, state = jax.jit(step)(after, state)
    for collection in ("params", "batch_stats"):
        for name, leaves in after[collection].items():
            same = jax.tree.map(lambda a, b: bool((a == b).all()), leaves, variables[collection][name])
            assert set(jax.tree.leaves(same)) == {name in ("conv1", "bn1", "layer1")}, (collection, name)
    np.testing.assert_array_equal(model.apply(variables, X, train=False), MODEL.apply(variables, X, train=False))
