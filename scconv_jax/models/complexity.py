"""Parameters and multiply-adds of a network, part by part, counted from shapes alone.

A multiply-add is one multiplication and one addition ("FLOPs" in both papers). Counts follow the papers: convolutions, linear
layers and the scales of norms; additions, activations, pooling and gates are excluded. An operator counts as in the
paper, even if a faster form of it runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from scconv_jax.layers.base import Layer


class Part(NamedTuple):
    """One part of a network, named as in its variables (`layer1/0`)."""

    name: str
    kind: str  # class of the module
    output: tuple[int, ...]  # shape for one image
    parameters: int
    multiply_adds: int  # for one image


def summarise(model: nn.Module, size: tuple[int, int] | None = None, depth: int = 2) -> list[Part]:
    """Return a network's parts in the order in which they run.

    Args:
        model: Any network of this library, or another Flax module called as `model(images, train=...)`.
        size: Height and width of the images, in pixels. If None, the `image_size` of the network, or 224 if it has none.
        depth: Depth of submodules to list: 1 for a network's stages, 2 for their blocks.

    Returns:
        The parts. Their counts add up to those of the whole network.
    """
    height, width = size or [getattr(model, "image_size", 224)] * 2
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = next_call(*args, **kwargs)
        if context.method_name == "__call__" and (last := jax.tree.leaves(result)[-1]).ndim > 1:
            outputs["/".join(context.module.path)] = type(context.module).__name__, last.shape
        return result

    with nn.intercept_methods(record):
        leaves, repeated = _sizes(model, height, width)
    outputs = _repeat_blocks(outputs, repeated)
    # Each value of a kernel or scale is multiplied once per pixel of its module's output.
    counts = {
        path: number * math.prod(_output_of(path, outputs)[1:-1]) for path, number in leaves.items() if path.endswith(_MULTIPLIED)
    }
    return [
        Part(name, kind, shape, _sum_below(name, leaves), _sum_below(name, counts))
        for name, (kind, shape) in outputs.items()
        if name and _is_listed(name, outputs, depth)
    ]


def parameter_paths(model: nn.Module, smallest: int) -> list[tuple[str, ...]]:
    """Return the path of each parameter of a network that takes images of `smallest` pixels."""
    return [tuple(path.split("/")) for path in _sizes(model, smallest, smallest)[0]]


def _sizes(model: nn.Module, height: int, width: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the size of each parameter by path, and the number of blocks per stage, as `shorten` does."""
    channels = getattr(model, "in_channels", None) or (getattr(model, "features", None) if isinstance(model, Layer) else None)
    images = jax.ShapeDtypeStruct((1, height, width, channels or 3), jnp.float32)
    short, repeated = shorten(model)
    variables = jax.eval_shape(lambda x: short.init(jax.random.key(0), x, train=False), images)
    sizes = jax.tree.map(lambda leaf: math.prod(leaf.shape), variables["params"])
    return _repeat_blocks(flatten_dict(sizes, sep="/"), repeated), repeated


_MULTIPLIED = ("/kernel", "/scale", "/gamma")


def shorten(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """Return a residual network with at most two blocks per stage, and the number of blocks per stage.

    The blocks of a stage after its first are alike, so that the short network, which is traced much faster, tells all about the
    long one. Other networks are returned as they are, with an empty dictionary.
    """
    sizes: tuple[int, ...] = getattr(model, "stage_sizes", ())
    if max(sizes, default=0) <= 2:
        return model, {}
    short = model.clone(stage_sizes=tuple(min(size, 2) for size in sizes))
    return short, {f"layer{i + 1}": size for i, size in enumerate(sizes)}


def _repeat_blocks(values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the values of a shortened network by path, with those of each stage's second block for all blocks after it."""
    result: dict[str, Any] = {}
    for stage, group in itertools.groupby(values.items(), lambda item: "/".join(item[0].split("/")[:2])):
        name, _, block = stage.partition("/")
        entries = list(group)
        for number in range(1, sizes[name]) if block == "1" and name in sizes else [block]:
            result |= {"/".join([name, str(number), *path.split("/")[2:]]) if block else path: value for path, value in entries}
    return result


def multiply_adds(model: nn.Module, size: tuple[int, int] | None = None) -> int:
    """Return a network's multiply-adds for one image.

    Args:
        model: As for `summarise`.
        size: Height and width of the image, in pixels. If None, the size that the network was designed for: 224, or 32 for
            the small networks.
    """
    return total(summarise(model, size, depth=1)).multiply_adds


def total(parts: Sequence[Part]) -> Part:
    """Return the whole network as one part, given its parts."""
    parameters, counts = (sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts))
    return Part("total", "", parts[-1].output, parameters, counts)


def _output_of(path: str, outputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """Return the output shape of the innermost module that contains a parameter and returns a map."""
    while path not in outputs:
        path = path.rpartition("/")[0]
    return outputs[path][1]


def _is_listed(name: str, names: Mapping[str, Any], depth: int) -> bool:
    """Return whether a part is at `depth`, or above it without parts of its own."""
    level = name.count("/") + 1
    return level == depth or (level < depth and not any(other.startswith(f"{name}/") for other in names))


def _sum_below(name: str, counts: Mapping[str, int]) -> int:
    return sum(count for path, count in counts.items() if path == name or path.startswith(f"{name}/"))
