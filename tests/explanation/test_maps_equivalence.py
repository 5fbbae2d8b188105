"""Grad-CAM and the units' parts against PyTorch's automatic differentiation and modules, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scconv_jax import ScConv, create_model, explanation
from tests.equivalence import variables_of
from tests.reference.networks import build
from tests.reference.scconv import ScConv as TorchScConv
from tests.reference.state import nchw, nhwc, random_images, randomise

SIZE = (13, 21)  # odd at every stage, and not square
pytestmark = pytest.mark.usefixtures("x64")
VARIANTS = ("paper", "2023-07", "2023-09", "2023-10")


def pair(name):
    model = create_model(name, dtype=jnp.float64).clone(stage_sizes=(1, 1, 1))
    oracle = randomise(build(name, depths=(1, 1, 1)), 0).double().eval()
    images = random_images((2, *SIZE, 3), 1)
    return oracle, model, variables_of(oracle, model, images), images


def keep_outputs(oracle, *kinds):
    """Returns a list that fills with the input and output of each module of these classes."""
    found = []
    for module in oracle.modules():
        if type(module).__name__ in kinds:
            module.register_forward_hook(lambda module, inputs, output: found.append((module, inputs[0], output)))
    return found


@pytest.mark.parametrize(("name", "stages"), [("scnet20_small", ("layer1", "layer3")), ("scconv_resnet20_small", ("layer2",))])
def test_grad_cam_equals_that_by_pytorch(close, name, stages):
    oracle, model, variables, images = pair(name)
    classes = [7, 2]
    maps = {}
    for stage in stages:
        getattr(oracle, stage).register_forward_hook(lambda _, __, y, stage=stage: maps.update({stage: y}))
    logits = oracle(nchw(images))
    gradients = torch.autograd.grad(logits[[0, 1], classes].sum(), list(maps.values()))
    for (stage, value), gradient in zip(maps.items(), gradients, strict=True):
        expected = (gradient.mean((2, 3), keepdim=True) * value).sum(1).relu().detach().numpy()
        found = explanation.grad_cam(model, variables, images, classes, stage)
        close(found, expected, stage, limit=1e-10)
    likely = explanation.grad_cam(model, variables, images)
    by_class = explanation.grad_cam(model, variables, images, logits.argmax(1).numpy())
    close(likely, by_class, "the likeliest class")


def test_receptive_fields_equal_those_by_pytorch(close):
    oracle, model, variables, images = pair("scnet20_small")
    tensor = nchw(images).requires_grad_()
    found = explanation.receptive_fields(model, variables, images)
    assert list(found) == ["layer1", "layer2", "layer3"]
    for stage, value in oracle.features(tensor).items():
        centre = value[:, :, value.shape[2] // 2, value.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, tensor, retain_graph=True)
        close(found[stage], gradient.abs().mean((0, 1)).numpy(), stage, limit=1e-10)


def test_gates_multiply_what_k4_takes(close):
    """The gate is what K4's input is divided by K3's output, in each block of the oracle."""
    oracle, model, variables, images = pair("scnet20_small")
    calibrations = keep_outputs(oracle, "SelfCalibration")
    inputs = []
    for module in oracle.modules():
        if type(module).__name__ == "SelfCalibration":
            module.k4.register_forward_hook(lambda _, x, __: inputs.append(x[0]))
    oracle(nchw(images))
    found = explanation.calibration_gates(model, variables, images)
    assert list(found) == [f"layer{i}/0/scconv" for i in (1, 2, 3)]
    for gate, (module, x, _), product in zip(found.values(), calibrations, inputs, strict=True):
        close(gate, nhwc(product / module.k3(x)), limit=1e-10)
        assert 0 < gate.min() < gate.max() < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_units_equal_those_of_pytorch(close, variant):
    groups = 4
    oracle = randomise(TorchScConv(16, variant, groups=groups), 0).double().eval()
    model = ScConv(variant=variant, groups=groups, dtype=jnp.float64)
    x = random_images((2, 7, 5, 16), 1)
    variables = variables_of(oracle, model, x)

    [(informative, redundant)] = explanation.reconstruction_maps(model, variables, x).values()
    normal, weights = oracle.SRU.weights(nchw(x))
    content = normal if variant == "2023-09" else nchw(x)
    above = weights >= 0.5 if variant in ("2023-07", "2023-09") else weights > 0.5
    hard = variant in ("2023-07", "2023-09")
    w1 = torch.where(above, 1.0, 0.0 if hard else weights)
    w2 = torch.where(above, 0.0, 1.0 if hard else weights)
    close(informative, nhwc(w1 * content), "informative", limit=1e-10)
    close(redundant, nhwc(w2 * content), "redundant", limit=1e-10)
    assert above.any()
    assert not above.all()

    [betas] = explanation.fusion_weights(model, variables, x).values()
    up, low = oracle.SRU(nchw(x)).split([8, 8], dim=1)
    up, low = oracle.CRU.squeeze1(up), oracle.CRU.squeeze2(low)
    y1 = oracle.CRU.GWC(up) + oracle.CRU.PWC1(up)
    y2 = torch.cat([oracle.CRU.PWC2(low), low], dim=1)
    fused = betas[:, 0, None, None] * nhwc(y1) + betas[:, 1, None, None] * nhwc(y2)
    close(fused, nhwc(oracle(nchw(x))), "β1 · Y1 + β2 · Y2", limit=1e-10)
    np.testing.assert_allclose(betas.sum(1) if variant == "paper" else betas.sum((1, 2)), 1, rtol=1e-12)
