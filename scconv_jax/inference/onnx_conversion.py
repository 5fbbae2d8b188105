"""`to_onnx`: a JAX function as an ONNX model.

The function is traced, and each of its operations becomes a few nodes of ONNX. What depends on constants alone (a norm's scale,
the dense form of a grouped kernel) is computed here and becomes a constant. Where the library has one form of an operation for
CPU and another for accelerators, ONNX gets the latter: it has grouped convolutions and pools too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from scconv_jax.functional.symbolic import is_symbolic
from scconv_jax.inference.onnx_graph import CHANNELS_FIRST, Graph, Value

if TYPE_CHECKING:
    import onnx

OPSET = 18
_IR_VERSION = 9  # readable by ONNX Runtime from 1.16 on


class ExportError(ValueError):
    """A function or network cannot be exported, or the exported file gives other results; the message says why."""


def to_onnx(
    function: Callable[..., Any],
    *arguments: jax.ShapeDtypeStruct,
    inputs: Sequence[str] = ("images",),
    output: str = "output",
    channels_first: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return an ONNX model (opset 18) that computes a function of arrays.

    Args:
        function: A function of arrays, such as `lambda images: model.apply(variables, images, train=False)`.
        *arguments: Shape and dtype of each argument. Sizes may be symbolic, from `jax.export.symbolic_shape`: symbols, or
            multiples of them such as `32*h`.
        inputs: Name of each argument.
        output: Name of the result. The arrays of a tuple or dictionary are called by their key or position.
        channels_first: Store arguments of four axes as (n, c, h, w), not (n, h, w, c).
        metadata: Entries of the model's `metadata_props`.

    Raises:
        ExportError: The function contains an operation that is not supported; the message names it.
        ModuleNotFoundError: The package `onnx` is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModuleNotFoundError("ONNX files need the package onnx: pip install 'scconv-jax[export]'") from error

    graph, given, values = Graph(), [], []
    for name, argument in zip(inputs, arguments, strict=True):
        order = CHANNELS_FIRST if channels_first and len(argument.shape) == 4 else tuple(range(len(argument.shape)))
        stored = [argument.shape[axis] for axis in order]
        given.append(_value_info(name, argument.dtype, stored))
        graph.name_sizes(name, stored)
        values.append(Value(tuple(argument.shape), name=name, order=order))
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # constants are folded in full precision
        results = _run(graph, closed.jaxpr, [_constant(value) for value in closed.consts], values, "")
    graph.scope, produced = "", []
    for (path, leaf), value in zip(jax.tree.leaves_with_path(shapes), results, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or output
        graph.nodes.append(onnx.helper.make_node("Identity", [graph.stored(value, whole=True)], [name], name=f"return {name}"))
        produced.append(_value_info(name, leaf.dtype, leaf.shape))
    nodes = _needed(graph.nodes, [info.name for info in produced])
    used = {name for node in nodes for name in node.input}
    constants = [tensor for name, tensor in graph.constants.items() if name in used]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "scconv_jax", given, produced, constants),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="scconv_jax",
    )
    onnx.helper.set_model_props(model, dict(metadata or {}))
    return model


def _run(graph: Graph, jaxpr: Any, constants: list[Value], arguments: list[Value], scope: str) -> list[Value]:
    """Write the nodes of a traced function and return its outputs."""
    known: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable: Any) -> Value:
        return _constant(variable.val, variable.aval.dtype) if hasattr(variable, "val") else known[variable]

    for equation in jaxpr.eqns:
        values = [read(variable) for variable in equation.invars]
        graph.scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        known.update(zip(equation.outvars, _apply(graph, equation, values, graph.scope), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(graph: Graph, equation: Any, values: list[Value], scope: str) -> Sequence[Value]:
    """Write the nodes of one operation, or compute it if its inputs are constants."""
    from scconv_jax.inference.onnx_operations import OPERATIONS  # only an export pays for it, not `import scconv_jax`

    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        return [_constant(np.int32(params["platforms"].index(None)))]  # the form for accelerators
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    if name == "cond" and values[0].data is not None:
        inner, values = params["branches"][int(values[0].data)], values[1:]
    if inner is not None:
        jaxpr, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        return _run(graph, jaxpr, [_constant(value) for value in constants], values, scope)
    whole = [value.whole() for value in values]
    fixed = not any(is_symbolic(*variable.aval.shape) for variable in equation.outvars)
    if name != "broadcast_in_dim" and fixed and "dim" not in params and all(array is not None for array in whole):
        found = equation.primitive.bind(*whole, **params)
        return [_constant(value) for value in (found if equation.primitive.multiple_results else [found])]
    if values and all(value.data is not None for value in values) and name != "broadcast_in_dim":
        values = [graph.written(value) for value in values]
    if name == "ne":
        return [OPERATIONS["not"](graph, equation, OPERATIONS["eq"](graph, equation, *values))]
    if name not in OPERATIONS:
        raise ExportError(f"The operation {name}{scope and f' in {scope}'} has no counterpart in ONNX here. {_ADVICE}")
    try:
        return [OPERATIONS[name](graph, equation, *values)]
    except NotImplementedError as error:
        raise ExportError(f"ONNX has no counterpart here of {error}{scope and f' (in {scope})'}. {_ADVICE}") from error


_ADVICE = "Export it as StableHLO, or write it with other operations."


def _constant(value: Any, dtype: Any = None) -> Value:
    data = np.asarray(value, dtype)
    return Value(data.shape, data)


def _value_info(name: str, dtype: Any, shape: Sequence[Any]) -> Any:
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.helper.make_tensor_value_info(name, kind, [str(size) if is_symbolic(size) else size for size in shape])


def _needed(nodes: list[Any], outputs: Sequence[str]) -> list[Any]:
    """Return the nodes that the outputs depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & {*node.output}:
            kept.append(node)
            wanted |= {*node.input}
    return kept[::-1]
