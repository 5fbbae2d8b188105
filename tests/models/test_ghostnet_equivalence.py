"""GhostNet as pytorchcv has it, from a file on disk under its names to equal outputs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch

from scconv_jax import load_model
from tests.equivalence import jit, torch_dtype
from tests.reference.namings import PytorchCVGhostNet
from tests.reference.state import nchw, random_images, randomise

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def oracle():
    return randomise(PytorchCVGhostNet(), 0).eval()


def test_as_many_parameters_as_its_own_code_asserts(oracle):
    assert sum(parameter.numel() for parameter in oracle.parameters()) == 5_180_840


def test_from_a_file_to_equal_outputs(close, precision, oracle, tmp_path):
    path = tmp_path / "ghostnet.pth"
    torch.save(oracle.state_dict(), path)
    model, variables = load_model(path, dtype=precision)
    assert repr(model).startswith("GhostNet(")
    images = random_images((2, 97, 65, 3), 1, precision)
    variables = jax.tree.map(partial(jnp.asarray, dtype=precision), variables)
    logits = jit(lambda variables, images: model.apply(variables, images, train=False))(variables, images)
    with torch.no_grad():
        expected = oracle.to(torch_dtype(precision))(nchw(images))
    close(logits, expected.numpy())
