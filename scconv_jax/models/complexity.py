"""How large a network is: parameters and multiply-adds by part, counted from shapes alone, at any size of image.

A multiply-add is one multiplication and one addition ("FLOPs" in both papers): those of convolutions and matrix products, and
one for each element that a norm scales and shifts. What is added, pooled or gated is not counted. Counted is the network as the
papers write it, also where another form of the same thing is computed because it runs faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Part(NamedTuple):
    """One part of a network, named as in its variables (`layer1/0`)."""

    name: str
    kind: str  # class of the module
    output: tuple[int, ...]  # shape for one image
    parameters: int
    multiply_adds: int  # for one image


def summarise(model: nn.Module, size: tuple[int, int] = (224, 224), depth: int = 2) -> list[Part]:
    """List a network's parts in the order in which they run.

    Args:
        model: any network of this library, or another Flax module called `model(images, train=...)`.
        size: height and width of the images, pixels.
        depth: how far to take the network apart: 1 gives its stages, 2 their blocks.

    Returns:
        The parts; their counts add up to those of the whole network.
    """
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = next_call(*args, **kwargs)
        if context.method_name == "__call__" and (last := jax.tree.leaves(result)[-1]).ndim > 1:
            outputs["/".join(context.module.path)] = type(context.module).__name__, last.shape
        return result

    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    leaves = {path: math.prod(leaf.shape) for path, leaf in _leaves(variables["params"])}
    # Each number of a kernel or scale is multiplied once for each position of the map that its module makes.
    counts = {
        path: number * math.prod(_owner(path, outputs)[1:-1]) for path, number in leaves.items() if path.endswith(_MULTIPLIED)
    }
    return [
        Part(name, kind, shape, _within(name, leaves), _within(name, counts))
        for name, (kind, shape) in outputs.items()
        if name and _is_listed(name, outputs, depth)
    ]


_MULTIPLIED = ("/kernel", "/scale", "/gamma")


def _owner(path: str, outputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """Shape of the output of the innermost module that a leaf belongs to and that makes a map."""
    while path not in outputs:
        path = path.rpartition("/")[0]
    return outputs[path][1]


def multiply_adds(model: nn.Module, size: tuple[int, int] = (224, 224)) -> int:
    """Count a network's multiply-adds for one image of `size` pixels."""
    return sum(part.multiply_adds for part in summarise(model, size, depth=1))


def parameters(model: nn.Module, size: tuple[int, int] = (224, 224)) -> int:
    """Count a network's parameters; `size`, pixels, is that of images it can take."""
    return sum(part.parameters for part in summarise(model, size, depth=1))


def _is_listed(name: str, names: Mapping[str, Any], depth: int) -> bool:
    """Whether a part is at `depth`, or above it and not taken apart any further."""
    level = name.count("/") + 1
    return level == depth or (level < depth and not any(other.startswith(f"{name}/") for other in names))


def _within(name: str, counts: Mapping[str, int]) -> int:
    return sum(count for path, count in counts.items() if path == name or path.startswith(f"{name}/"))


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        here = f"{path}/{key}" if path else key
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
        else:
            yield here, value
