"""Explanations of networks and layers without PyTorch: known answers, and each error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax import explanation


class Small(nn.Module):
    """A convolution whose centre is known, one self-calibrated operator, and a head."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(scconv_jax.SelfCalibratedConv(8, name="calibrated")(x, train=train))
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def small():
    images = np.random.default_rng(0).standard_normal((3, 11, 9, 3)).astype(np.float32)
    variables = Small().init(jax.random.key(0), images, train=False)
    return Small(), variables, images


def test_the_receptive_field_of_a_convolution_is_its_square(small):
    model, variables, images = small
    field = np.array(explanation.receptive_fields(model, variables, images, ["conv"])["conv"])
    assert field.shape == (11, 9)
    kernel = np.abs(np.asarray(variables["params"]["conv"]["kernel"]).sum(3)).mean(2)
    np.testing.assert_allclose(field[4:7, 3:6], kernel, rtol=1e-5)
    field[4:7, 3:6] = 0
    assert not field.any()


def test_the_gate_of_a_layer_in_a_network_of_ones_own(small):
    model, variables, images = small
    gates = explanation.calibration_gates(model, variables, images)
    assert {path: gate.shape for path, gate in gates.items()} == {"calibrated/scconv": (3, 11, 9, 4)}
    layer = {name: tree["calibrated"]["scconv"] for name, tree in variables.items()}
    x = nn.Conv(8, (3, 3)).apply({"params": variables["params"]["conv"]}, images)[..., :4]
    branch = scconv_jax.SelfCalibration(4)
    k3 = branch.apply(layer, x, method=lambda module, x: module.k3(x, train=False))
    k4_input = []

    def intercept(next_call, args, kwargs, context):
        if context.module.name == "k4" and context.method_name == "__call__":
            k4_input.append(args[0])
        return next_call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        branch.apply(layer, x, train=False)
    np.testing.assert_allclose(gates["calibrated/scconv"] * k3, k4_input[0], rtol=2e-5, atol=1e-6)


def test_grad_cam_of_a_network_of_ones_own(small):
    model, variables, images = small
    cam = explanation.grad_cam(model, variables, images, 3, "calibrated")
    assert cam.shape == (3, 11, 9)
    assert cam.min() >= 0
    # The head is linear in the map after a ReLU: the derivative of its average is the head's kernel where the map is positive.
    found = {}

    def intercept(next_call, args, kwargs, context):
        result = next_call(*args, **kwargs)
        if context.module.name == "calibrated":
            found["map"] = result
        return result

    with nn.intercept_methods(intercept):
        model.apply(variables, images, train=False)
    values = np.asarray(found["map"])
    weights = np.asarray(variables["params"]["fc"]["kernel"])[:, 3] * (values > 0).mean((1, 2), keepdims=True) / (11 * 9)
    np.testing.assert_allclose(cam, np.maximum((weights * values).sum(-1), 0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Small has no stages: name layers, such as conv, calibrated, calibrated/k1 and 11 more."),
        ({"layer": "calibratd"}, "Small has no layer 'calibratd' with a map. Did you mean 'calibrated'"),
        ({"layer": "fc"}, "Small has no layer 'fc' with a map. Its layers: conv, calibrated"),
        ({"layer": "conv", "classes": 5}, "There is no class 5: the network has classes 0 to 4."),
        ({"layer": "conv", "classes": [0, -1, 0]}, "There is no class -1"),
        (
            {"layer": "conv", "classes": [1, 2]},
            "classes has shape (2,) and dtype int64; expected one integer, or one for each of",
        ),
        ({"layer": "conv", "classes": 1.5}, "classes has shape () and dtype float64; expected one integer"),
    ],
)
def test_errors_of_layers_and_classes(small, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared whole
        explanation.grad_cam(*small, **arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("function", "operator", "having", "lacking"),
    [
        (explanation.calibration_gates, "self-calibrated convolution", "scnet50", "scconv_resnet50"),
        (explanation.reconstruction_maps, "SRU", "scconv_resnet50", "scnet50"),
        (explanation.fusion_weights, "CRU", "scconv_densenet121_small", "scnet50"),
    ],
)
def test_a_network_without_the_operator(function, operator, having, lacking):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            return nn.Dense(3)(x.mean((1, 2)))

    images = jnp.zeros((1, 4, 4, 3))
    variables = Plain().init(jax.random.key(0), images, train=False)
    with pytest.raises(ValueError, match=f"Plain has no {operator}. These networks have one: ") as error:
        function(Plain(), variables, images)
    names = str(error.value).split(": ")[1].rstrip(".").split(", ")
    assert having in names
    assert lacking not in names


def test_images_that_are_too_small():
    model = scconv_jax.create_model("scnet20_small")
    images = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="at least 13×13 px; got 8×8"):
        explanation.grad_cam(model, {"params": {}}, images)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("densenet121_small", {"layer1": "dense1", "layer2": "dense2", "layer3": "dense3", "layer4": "pool"}),
        ("wrn28_10_small", {"layer1": "block1", "layer2": "block2", "layer3": "pool"}),
        ("ghostnet_100", {f"layer{i + 1}": f"blocks/{block}" for i, block in enumerate((0, 2, 4, 6, 9))}),
        ("resnet20_small", {f"layer{i}": f"layer{i}" for i in (1, 2, 3)}),
    ],
)
def test_the_stages_of_every_family_are_found(name, places):
    from scconv_jax.explanation.capture import find_places
    from scconv_jax.interop.recognition import template

    model = scconv_jax.create_model(name)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert find_places(model, template(model), images, None) == places
