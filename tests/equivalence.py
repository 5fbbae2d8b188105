"""Compares a Flax module with its PyTorch oracle: same state, same input, and all outputs, gradients and statistics."""

import copy
import os
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from scconv_jax import from_torch, to_torch
from tests.reference.state import nchw, nhwc, random_images


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` that optimises float32 as users have it, and float64 not at all.

    The test run switches optimisations off (conftest.py): in float64 they only cost time.
    """
    options: dict[str, Any] | None = None
    if not jax.config.jax_enable_x64:
        options = {"xla_backend_optimization_level": 3}
        if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
            options["xla_cpu_use_fusion_emitters"] = True
    return jax.jit(function, compiler_options=options)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    return getattr(torch, np.dtype(dtype).name)


def variables_of(oracle: torch.nn.Module, model: Any, x: np.ndarray) -> dict[str, Any]:
    """Returns the oracle's state as variables of `model`, for inputs of the shape of `x`."""
    template = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.asarray(x))
    return jax.tree.map(jnp.asarray, from_torch(oracle.state_dict(), template))


def compare_module(close, model: Any, oracle: torch.nn.Module, x: np.ndarray, *, train: bool, dead: Collection[str] = ()) -> None:
    """Compares the output, the gradients of the input and of each parameter, and each running statistic.

    Args:
        close: The fixture `close`.
        model: Flax module, called as `model(x, train=train)`.
        oracle: PyTorch module, in any dtype. It is copied, not changed.
        x: Input, `(n, h, w, c)` or `(n, c)`. Both sides compute in its dtype.
        train: Whether to normalise by the statistics of the batch.
        dead: Names of the parameters that must get no gradient.
    """
    to_torch_layout, from_torch_layout = (nchw, nhwc) if x.ndim == 4 else (torch.from_numpy, lambda t: t.detach().numpy())
    oracle = copy.deepcopy(oracle).to(torch_dtype(x.dtype)).train(train)
    variables = variables_of(oracle, model, x)

    tensor = to_torch_layout(x).requires_grad_()
    expected = oracle(tensor)
    y = from_torch_layout(expected)
    cotangent = random_images(y.shape, 99, x.dtype)
    expected.backward(to_torch_layout(cotangent))

    @jit
    def run(variables, x, cotangent):
        state = {key: value for key, value in variables.items() if key != "params"}

        def apply(params, x):
            return model.apply({"params": params, **state}, x, train=train, mutable=["batch_stats"])

        output, vjp, new = jax.vjp(apply, variables["params"], x, has_aux=True)
        return output, vjp(cotangent), new

    output, (gradients, gradient), new = run(variables, x, cotangent)
    close(output, y)
    close(gradient, from_torch_layout(tensor.grad), "gradient of the input")
    compare_gradients(close, gradients, oracle, dead)
    if new:
        compare_statistics(close, variables["params"], new["batch_stats"], oracle)


def compare_gradients(close, gradients: Any, oracle: torch.nn.Module, dead: Collection[str] = ()) -> None:
    """Compares a tree of gradients with the oracle's after `backward`, name by name."""
    found = to_torch({"params": gradients})
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    assert set(found) == set(expected)
    assert set(dead) == {name for name, value in expected.items() if value is None or not value.any()}
    for name, value in expected.items():
        if name in dead:
            np.testing.assert_array_equal(found[name], 0, err_msg=f"gradient of {name}")
        else:
            close(found[name], value.numpy(), f"gradient of {name}")


def compare_statistics(close, params: Any, batch_stats: Any, oracle: torch.nn.Module) -> None:
    """Compares running means and variances with the oracle's, name by name."""
    found = to_torch({"params": params, "batch_stats": batch_stats})
    expected = {name: buffer for name, buffer in oracle.named_buffers() if not name.endswith("num_batches_tracked")}
    assert expected
    for name, value in expected.items():
        close(found[name], value.numpy(), name)
