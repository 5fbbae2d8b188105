"""Finds the form of each layer by tracing a network once.

A convolution and a norm are one operation if the norm's input is the convolution's output and nothing else reads that output.
Both are marked with names in the traced program, so that this holds for any network, however its author wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from scconv_jax.functional.convolution import dense_blocks
from scconv_jax.fusion.forms import Affine, Folded, Form, Joined, Norm, Passed, Path
from scconv_jax.fusion.winograd import suits_winograd
from scconv_jax.layers.core import BatchNorm, Conv, Dense
from scconv_jax.layers.reconstruction import CRU
from scconv_jax.layers.variants import VARIANTS

_MARK = "scconv_jax.fuse:"


class FuseError(ValueError):
    """A network or its variables cannot be fused."""


class _Call(NamedTuple):
    """One call of a layer during the trace."""

    path: Path
    layer: Any
    shape: tuple[int, ...]  # of the input
    dtype: Any  # of the output


def make_plan(
    model: Any, variables: Mapping[str, Any], images: jax.ShapeDtypeStruct, options: Mapping[str, bool], platform: str
) -> dict[Path, Form]:
    """Return the form of each layer that has one, by the layer's path.

    Args:
        model: A network or layer.
        variables: Its variables, or only their shapes.
        images: Shape and dtype of its input.
        options: Keyword arguments of the call, `{"train": False}` or none.
        platform: Platform of the programs, "cpu" or another.

    Raises:
        FuseError: A norm is not our BatchNorm, or normalises by the batch's statistics.
    """
    calls: list[_Call] = []
    kinds: dict[Path, str] = {}

    def watch(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, number = context.module, len(calls)
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        kinds[layer.path] = type(layer).__name__
        _check_norm(layer, kwargs)
        if type(layer) not in (Conv, Dense, BatchNorm, CRU):
            return next_call(*args, **kwargs)
        calls.append(_Call(layer.path, layer.clone(parent=None), args[0].shape, args[0].dtype))
        if type(layer) is BatchNorm:
            args = (checkpoint_name(args[0], f"{_MARK}{number}"), *args[1:])
        result = next_call(*args, **kwargs)
        calls[number] = calls[number]._replace(dtype=result.dtype)
        return checkpoint_name(result, f"{_MARK}{number}") if type(layer) in (Conv, Dense) else result

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(variables))
    with nn.intercept_methods(watch):
        program = jax.make_jaxpr(lambda tree, x: model.apply(tree, x, **options))(shapes, images)
    by_path: dict[Path, list[int]] = {}
    for number, call in enumerate(calls):
        by_path.setdefault(call.path, []).append(number)
    for path in _modules(shapes.get("batch_stats", {})):
        if path in kinds and not isinstance(calls[by_path[path][0]].layer if path in by_path else None, BatchNorm):
            raise FuseError(_custom(path, kinds[path]))

    norm_of = {}  # by number of the convolution's call
    for jaxpr in _with_parts(program.jaxpr):
        norm_of |= _pairs(jaxpr, {i for i, call in enumerate(calls) if type(call.layer) in (Conv, Dense)})
    conv_of = {norm: conv for conv, norm in norm_of.items()}
    plan: dict[Path, Form] = {}
    for path, numbers in by_path.items():
        call = calls[numbers[0]]
        own = _at(shapes["params"], path)
        if isinstance(call.layer, CRU):
            form = _joined(call, own, min(min(calls[i].shape[1:3]) for i in numbers), platform)
        elif isinstance(call.layer, BatchNorm):
            if getattr(own.get("scale"), "ndim", 0) != 1:  # stacked by nn.scan or nn.vmap
                continue
            partner = _only([conv_of.get(i) for i in numbers], calls)
            matched = partner is not None and _only([norm_of.get(i) for i in by_path[partner]], calls) == path
            foldable = matched and getattr(_at(shapes["params"], partner or ()).get("kernel"), "ndim", 0) in (2, 4)
            form = Passed() if foldable else Affine(_norm(call), _leaf_dtype(own["scale"].dtype, call.layer.dtype))
        else:
            form = None  # after the norms, which decide
        if form is not None:
            plan[path] = form
    for path, numbers in by_path.items():
        call = calls[numbers[0]]
        if not isinstance(call.layer, (Conv, Dense)):
            continue
        partner = _only([norm_of.get(i) for i in numbers], calls)
        norm = _norm(calls[by_path[partner][0]]) if partner is not None and isinstance(plan.get(partner), Passed) else None
        kernel = _at(shapes["params"], path).get("kernel")
        ndim = getattr(kernel, "ndim", 0)
        winograd = ndim == 4 and platform == "cpu" and call.dtype in (jnp.float32, jnp.float64) and _suits(kernel, numbers, calls)
        if (norm is not None or winograd) and kernel is not None:
            plan[path] = Folded(norm, winograd, _leaf_dtype(kernel.dtype, call.layer.dtype), kernel.dtype.name)
    return plan


def _suits(kernel: Any, numbers: list[int], calls: list[_Call]) -> bool:
    layer = calls[numbers[0]].layer
    size = min(min(calls[i].shape[1:3]) for i in numbers)
    return suits_winograd(kernel.shape, layer.strides, layer.padding, layer.dilation, layer.groups, size)


def _joined(call: _Call, own: Mapping[str, Any], size: int, platform: str) -> Joined | None:
    """Return the form of a CRU, or None if two convolutions are faster."""
    layer = call.layer
    gwc, pwc1 = own["GWC"]["kernel"], own["PWC1"]["kernel"]
    if gwc.ndim != 4:  # stacked by nn.scan or nn.vmap
        return None
    dense = (*gwc.shape[:2], *pwc1.shape[2:])
    winograd = (
        platform == "cpu"
        and call.dtype in (jnp.float32, jnp.float64)
        and suits_winograd(dense, 1, layer.dilation * (layer.kernel_size // 2), layer.dilation, 1, size)
    )
    largest = 2 if platform == "cpu" else 8  # number of groups up to which the zeros between them cost less than a second pass
    if not winograd and layer.conv_groups > largest and dense_blocks(layer.conv_groups, pwc1.shape[2]) > 1:
        return None
    fuse = layer.fuse or VARIANTS[layer.variant].fuse
    return Joined(winograd, _leaf_dtype(gwc.dtype, layer.dtype), gwc.dtype.name, fuse)


def _check_norm(layer: Any, kwargs: Mapping[str, Any]) -> None:
    norm = getattr(layer, "norm", None)
    while isinstance(norm, functools.partial):
        norm = norm.func
    if isinstance(norm, type) and issubclass(norm, nn.Module) and norm is not BatchNorm:
        raise FuseError(_custom(layer.path, norm.__name__))
    if type(layer) is BatchNorm and kwargs.get("train"):
        raise FuseError(
            f"{_named(layer.path)} normalises by the batch's statistics (train=True) even in inference: the network is in "
            "training. Build it so that `train=False` reaches every BatchNorm."
        )


def _custom(path: Path, kind: str) -> str:
    return (
        f"{_named(path)}: the norm {kind} cannot be folded into a convolution; only scconv_jax.layers.BatchNorm can. Build the "
        "network with that norm, or use it unfused."
    )


def _named(path: Path) -> str:
    return "/".join(path) or "The layer"


def _norm(call: _Call) -> Norm:
    dtype = call.layer.dtype
    return Norm(call.path, call.layer.epsilon, None if dtype is None else jnp.dtype(dtype).name)


def _leaf_dtype(parameter: Any, computation: Any) -> str:
    """Return float64 if the layer may compute in it, so that folding loses nothing; else float32."""
    wide = jnp.float64 in (parameter, computation) or computation is None
    return "float64" if jax.config.jax_enable_x64 and wide else "float32"  # pyright: ignore[reportAttributeAccessIssue]


def _only(numbers: list[int | None], calls: list[_Call]) -> Path | None:
    """Return the path that all calls have in common, or None."""
    paths = {None if number is None else calls[number].path for number in numbers}
    return paths.pop() if len(paths) == 1 else None


def _pairs(jaxpr: Any, convs: set[int]) -> dict[int, int]:
    """Return the number of the norm's call by that of the convolution's, where the norm alone reads the convolution's output."""
    readers: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        for var in eqn.invars:
            if not hasattr(var, "val"):  # not a literal
                readers.setdefault(var, []).append(eqn)
    for var in jaxpr.outvars:
        if not hasattr(var, "val"):
            readers.setdefault(var, []).append(None)
    found = {}
    for eqn in jaxpr.eqns:
        number = _number(eqn)
        if number in convs and [_number(reader) is not None for reader in readers.get(eqn.outvars[0], [])] == [True]:
            reader = _number(readers[eqn.outvars[0]][0])
            if reader not in convs:
                found[number] = reader
    return found


def _number(eqn: Any) -> int | None:
    name = eqn.params.get("name") if eqn is not None and eqn.primitive.name == "name" else None
    return int(name.removeprefix(_MARK)) if isinstance(name, str) and name.startswith(_MARK) else None


def _with_parts(jaxpr: Any) -> Iterator[Any]:
    """Yield a program and the programs inside its operations."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _with_parts(inner)


def _at(tree: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for name in path:
        tree = tree.get(name, {})
    return tree


def _modules(tree: Mapping[str, Any], path: Path = ()) -> Iterator[Path]:
    """Yield the paths of the modules that own a leaf."""
    if any(not isinstance(value, Mapping) for value in tree.values()):
        yield path
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _modules(value, (*path, name))
