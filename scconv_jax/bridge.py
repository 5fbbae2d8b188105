"""Networks and layers with their weights in NNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

if TYPE_CHECKING:  # imported late: users of Linen need no NNX
    from flax.nnx import Rngs
    from flax.nnx.bridge import ToNNX


def to_nnx(model: nn.Module, variables: Mapping[str, Any], rngs: Rngs | None = None) -> ToNNX:
    """Return a network or layer as an NNX module with these weights: `flax.nnx.bridge.ToNNX`, filled.

    `ToNNX` keeps a leaf `params/layer1/0/conv1/kernel` as an `nnx.Param` at `module.layer1["0"]["conv1"]["kernel"]`, so
    `nnx.update(module, variables)` would put leaves where no call finds them.

    Args:
        model: A network or layer of this library, or another Linen module.
        variables: `{"params": ..., "batch_stats": ...}`, as `model.init`, `load_model` and `load` return them.
        rngs: Random numbers for `dropout` and `drop_path`, as `nnx.Rngs(dropout=0)`. If None, there are none.

    Returns:
        The module. `module(images, train=False)` evaluates; `module(images, train=True, mutable=["batch_stats"])` also updates
        its running statistics, under `nnx.jit` and `nnx.grad` too.

    Raises:
        ValueError: There is no collection `params`.
    """
    if "params" not in variables:
        raise ValueError(f"Variables are {{'params': ..., 'batch_stats': ...}}; got {', '.join(map(str, variables)) or 'none'}.")
    from flax import nnx
    from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs

    module = nnx.bridge.ToNNX(model, rngs=rngs)
    for name, leaves in linen_vars_to_nnx_attrs(jax.tree.map(jnp.asarray, dict(variables))).items():
        setattr(module, name, nnx.data(leaves))
    return module


def from_nnx(module: ToNNX) -> dict[str, Any]:
    """Return the variables of a module that `to_nnx` made, for `model.apply`, `save` and `to_torch`."""
    from flax.nnx.bridge.variables import nnx_attrs_to_linen_vars

    leaves = {name: value for name, value in vars(module).items() if not name.startswith(("to_nnx__", "_pytree__"))}
    return dict(nnx_attrs_to_linen_vars(leaves))
