"""Networks and layers with their weights in NNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.models.network import Network

if TYPE_CHECKING:  # imported late: users of Linen need no NNX
    from flax.nnx import Rngs
    from flax.nnx.bridge import ToNNX


def to_nnx(model: nn.Module, variables: Mapping[str, Any], rngs: Rngs | jax.Array | int | None = None) -> ToNNX:
    """Return a network or layer as an NNX module with these weights: a filled `flax.nnx.bridge.ToNNX`.

    `ToNNX` keeps a leaf `params/layer1/0/conv1/kernel` as an `nnx.Param` at `module.layer1["0"]["conv1"]["kernel"]`, so
    `nnx.update(module, variables)` would put leaves where no call finds them.

    Args:
        model: A network or layer of this library, or another Linen module.
        variables: `{"params": ..., "batch_stats": ...}`, as `model.init`, `load_model` and `load` return them.
        rngs: Random numbers for `dropout` and `drop_path`: `nnx.Rngs(dropout=0)`, a key (a scalar) or a seed, or None.

    Returns:
        The module. `module(images, train=False)` evaluates; `module(images, train=True)` also updates its running statistics,
        under `nnx.jit` and `nnx.grad` too. After `module.train()` or `module.eval()`, calls may leave `train` out.

    Raises:
        TypeError: `model` is no Linen module, or `rngs` are no random numbers.
        ValueError: There is no collection `params`, or the variables are of another network.

    Example:
        `module = to_nnx(*scconv_jax.load_model("scnet50"))`
    """
    if not isinstance(model, nn.Module):
        hint = {str: f" Use create_model({model!r}).", tuple: " Unpack it: to_nnx(*load_model(NAME))."}.get(type(model), "")
        raise TypeError(f"to_nnx(model, variables) takes a Linen module; got {type(model).__name__}.{hint}")
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = ", ".join(map(str, variables)) or "none" if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"Variables are {{'params': ..., 'batch_stats': ...}}; got {found}.")
    if isinstance(model, Network):
        model.check_params(variables["params"])
    from flax import nnx
    from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs

    from scconv_jax.nnx_module import NnxModule

    if isinstance(rngs, (int, jax.Array)):
        rngs = nnx.Rngs(rngs)
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs={rngs!r:.100} must be nnx.Rngs(dropout=0), a key or a seed.")
    module = NnxModule(model, rngs=rngs)
    for name, leaves in linen_vars_to_nnx_attrs(jax.tree.map(jnp.asarray, dict(variables))).items():
        setattr(module, name, nnx.data(leaves))
    return module


def from_nnx(module: ToNNX) -> dict[str, Any]:
    """Return the variables of a module that `to_nnx` made, for `model.apply`, `save` and `to_torch`.

    Raises:
        TypeError: The module is no `flax.nnx.bridge.ToNNX`.
    """
    from flax.nnx.bridge import ToNNX
    from flax.nnx.bridge.variables import nnx_attrs_to_linen_vars

    if not isinstance(module, ToNNX):
        raise TypeError(f"from_nnx takes a module that to_nnx made; got {type(module).__name__}. Give it the part that is one.")
    leaves = {name: value for name, value in vars(module).items() if not name.startswith(("to_nnx__", "_pytree__"))}
    return dict(nnx_attrs_to_linen_vars(leaves))
