"""Prepares a network and its variables for another task: another head, and parameters that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import traverse_util

from scconv_jax.layers.core import Dense
from scconv_jax.messages import did_you_mean, listed
from scconv_jax.models.network import Network, path_matches

AnyNetwork = TypeVar("AnyNetwork", bound=Network)
Variables = dict[str, Any]


def reset_classifier(
    model: AnyNetwork, variables: Mapping[str, Any], num_classes: int, key: jax.Array | int | None = None
) -> tuple[AnyNetwork, Variables]:
    """Return the network with another number of classes, and its variables with a new head.

    Args:
        model: A network of this library.
        variables: Its variables; they are not changed.
        num_classes: Length of the logits. If 0, the head is left out, and the network returns pooled features.
        key: Key for the initial values of the head, or its seed. If None, `jax.random.key(0)`.

    Returns:
        `(model, variables)`. The head's kernel has the shape `(num_features, num_classes)`; all other leaves are those of
        `variables`.

    Raises:
        TypeError: `model` is no network of this library.
        ValueError: `num_classes` is not 0 or a positive integer, or the variables are of another network.

    Example:
        `model, variables = reset_classifier(*scconv_jax.load_model("scnet50"), num_classes=10)`
    """
    _check_network(model, "reset_classifier(model, variables, num_classes)")
    model = model.clone(num_classes=num_classes)
    if "params" not in variables:
        raise ValueError(f"Variables are {{'params': ..., 'batch_stats': ...}}; got {listed(list(map(str, variables)), 5)}.")
    params = {name: leaves for name, leaves in variables["params"].items() if name != model.head}
    model.check_params(params)
    if key is None or isinstance(key, int):
        key = jax.random.key(key or 0)
    if num_classes:
        dtype = jax.tree.leaves(params)[0].dtype if model.param_dtype is None else model.param_dtype
        head = Dense(num_classes, param_dtype=dtype, kernel_init=model.kernel_init)
        features = jnp.zeros((1, model.num_features), dtype)
        params[model.head] = head.init(key, features)["params"]
    return model, {**variables, "params": params}


def frozen_mask(model: Network, params: Mapping[str, Any], names: Sequence[str] | None = None) -> Variables:
    """Return a tree of bool like `params`: True for the parameters that stay as they are, for `optax.selective_transform`.

    Args:
        model: A network of this library.
        params: Its parameters, `variables["params"]`, or their shapes.
        names: Stages ("stem", "layer1", ..., "head"), or patterns of paths: of modules (`layer1/0`, `*/bn1`) or of single
            parameters (`*/bias`). If None, the network's attribute `frozen`.

    Returns:
        The mask. A parameter is frozen if its path, or that of a module around it, matches a name.

    Raises:
        TypeError: `model` is no network of this library.
        ValueError: A name matches no parameter, or every parameter is frozen.

    Example:
        `optax.selective_transform(optax.sgd(0.01), freeze_mask=frozen_mask(model, variables["params"]))` keeps these parameters,
        with weight decay and momentum too. The norms around them keep their statistics if the network has the same names in its
        attribute `frozen`.
    """
    _check_network(model, "frozen_mask(model, params)")
    names = model.frozen if names is None else names
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        example = [names] if isinstance(names, str) else ["stem", "layer1"]
        raise ValueError(f"names={names!r} must be a sequence of names: give {example!r}.")
    if "params" in params:
        raise ValueError("params are variables: give variables['params'].")
    paths = list(traverse_util.flatten_dict(dict(params)))
    stages = model.stages()
    for name in names:
        if not any(path_matches(path, stages.get(name, (name,))) for path in paths):
            hint = did_you_mean(name, dict.fromkeys([*stages, *params, *("/".join(path) for path in paths)]))
            raise ValueError(f"No parameter is in {name!r}.{hint} Stages: {', '.join(stages)}.")
    patterns = [pattern for name in names for pattern in stages.get(name, (name,))]
    mask = {path: path_matches(path, patterns) for path in paths}
    if all(mask.values()):
        raise ValueError(f"{', '.join(names)}: every parameter is frozen; leave out one stage, such as head.")
    return traverse_util.unflatten_dict(mask)


def _check_network(model: object, call: str) -> None:
    if not isinstance(model, Network):
        hint = f" Use create_model({model!r})." if isinstance(model, str) else ""
        raise TypeError(f"{call} takes a network of this library; got {type(model).__name__}.{hint}")
