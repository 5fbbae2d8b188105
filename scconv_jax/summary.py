"""How large a network is: parameters and multiply-adds by part, counted from shapes alone, at any size of image.

A multiply-add is one multiplication and one addition ("FLOPs" in both papers): those of convolutions and matrix products, and
one for each element that batch normalisation scales and shifts. What is added, pooled or gated is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.layers import BatchNorm


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
        if context.method_name == "__call__" and hasattr(result, "shape"):
            outputs["/".join(context.module.path)] = type(context.module).__name__, result.shape
        return result

    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    counts = _multiply_adds(model, variables, images)
    counts |= {name: math.prod(shape) for name, (kind, shape) in outputs.items() if kind == BatchNorm.__name__}
    parameters = {path: math.prod(leaf.shape) for path, leaf in _leaves(variables["params"])}
    return [
        Part(name, kind, shape, _within(name, parameters), _within(name, counts))
        for name, (kind, shape) in outputs.items()
        if name and _is_listed(name, outputs, depth)
    ]


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


def _multiply_adds(model: nn.Module, variables: Any, images: Any) -> dict[str, int]:
    """Multiply-adds by module path, read off the traced program."""
    program = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    counts: dict[str, int] = {}
    for equation, scope in _equations(program.jaxpr):
        # Flax names scopes Class/Class.method/child/...: the path is what is left without the network's own.
        own = type(model).__name__
        path = "/".join(part for part in scope.split("/") if part != own and not part.startswith(f"{own}."))
        counts[path] = counts.get(path, 0) + _cost(equation)
    return {path: count for path, count in counts.items() if count}


def _equations(jaxpr: Any, outer: str = "") -> Iterator[tuple[Any, str]]:
    for equation in jaxpr.eqns:
        scope = "/".join(filter(None, (outer, str(equation.source_info.name_stack))))
        yield equation, scope
        for parameter in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(parameter):
                yield from _equations(getattr(parameter, "jaxpr", parameter), scope)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


def _cost(equation: Any) -> int:
    shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
    if equation.primitive.name == "conv_general_dilated":
        _, kernel, output = shapes
        features = equation.params["dimension_numbers"].rhs_spec[0]
        return math.prod(output) * math.prod(kernel) // kernel[features]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
    return 0
