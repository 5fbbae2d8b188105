"""Compiler options for inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scconv_jax
from scconv_jax.inference import options
from scconv_jax.layers import Conv

NAME = "xla_cpu_experimental_ynn_fusion_type"


@pytest.fixture(autouse=True)
def fresh():
    options._accepted.cache_clear()
    yield
    options._accepted.cache_clear()


def test_options_hold_for_one_program_and_keep_its_values():
    x = jax.random.normal(jax.random.key(0), (2, 9, 7, 8))
    layer = Conv(16, 3, padding=1)
    variables = layer.init(jax.random.key(1), x)
    found = scconv_jax.inference_options()
    assert found == {NAME: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    fast = jax.jit(layer.apply, compiler_options=found)(variables, x)
    np.testing.assert_allclose(fast, jax.jit(layer.apply)(variables, x), atol=1e-5)
    assert "convolution(" in jax.jit(layer.apply, compiler_options=found).lower(variables, x).compile().as_text()


@pytest.mark.parametrize("platform", ["gpu", "cuda", "tpu", "METAL"])
def test_no_options_on_accelerators(platform):
    assert scconv_jax.inference_options(platform) == {}


def test_options_that_the_user_sets_are_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{NAME}=LIBRARY_FUSION_TYPE_INVALID")
    assert scconv_jax.inference_options() == {}


@pytest.mark.parametrize(("name", "value"), [("_NAME", "xla_cpu_no_such_option"), ("_VALUE", "NO_SUCH_VALUE")])
def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch, name, value):
    monkeypatch.setattr(options, name, value)
    assert scconv_jax.inference_options() == {}


def test_no_platform_is_no_error(monkeypatch):
    def no_backend():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "default_backend", no_backend)
    assert scconv_jax.inference_options() == {}


@pytest.mark.usefixtures("x64")
def test_the_probe_ignores_the_default_dtype():
    assert scconv_jax.inference_options() == scconv_jax.inference_options("cpu")
    assert jnp.zeros(()).dtype == jnp.float64
