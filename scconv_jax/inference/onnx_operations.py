"""JAX's operations in ONNX: a table from the name of a primitive to a function that writes its nodes.

Each function takes the graph, the equation of the traced function and its input values, and returns the output value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from scconv_jax.functional.symbolic import is_symbolic
from scconv_jax.inference.onnx_graph import CHANNELS_FIRST, Graph, Value, may_differ, node_value
from scconv_jax.inference.onnx_shapes import (
    broadcast,
    concatenate,
    cut,
    gather,
    pad,
    reshape,
    reverse,
    stack,
    tile,
    transpose,
)


def elementwise(operation: str, graph: Graph, equation: Any, *values: Value) -> Value:
    """Write an operation of values of equal shapes, or scalars; sizes of 1 are broadcast."""
    shape = tuple(equation.outvars[0].aval.shape)
    if operation == "Div" and values[0].summed and values[1].data is not None and values[1].data.size == 1:
        mean, name, attributes, count = values[0].summed
        if values[1].data == count:
            return node_value(graph.add(mean, *name, **attributes), shape, values[0].order)
    computed = [value for value in values if value.data is None and len(value.shape) == len(shape)]
    order = min(computed, key=lambda value: len(value.ones)).order if computed else tuple(range(len(shape)))
    names = [graph.stored(value, order if value.shape else None) for value in values]
    maps = [value for value in values if value.shape]
    ones = {axis for axis in range(len(shape)) if all(value.single(axis) for value in maps) and may_differ(shape[axis], 1)}
    if operation == "Max" and any(value.data is not None and value.data.size == 1 and value.data == 0 for value in values):
        operation, names = "Relu", [name for name, value in zip(names, values, strict=True) if value.data is None]
    if operation == "Where":  # `select_n` has the value for False first
        names = [names[0], names[2], names[1]]
    return Value(shape, name=graph.add(operation, *names), order=order, ones=frozenset(ones))


def _composed(write: Callable[[Graph, str], str], graph: Graph, equation: Any, value: Value) -> Value:
    """Write an operation of one value that takes several nodes."""
    name = write(graph, graph.stored(value, value.order or None))
    return node_value(name, equation.outvars[0].aval.shape, value.order or range(len(value.shape)), ones=value.ones)


def _power(graph: Graph, equation: Any, value: Value) -> Value:
    return elementwise("Pow", graph, equation, value, Value((), np.array(equation.params["y"], np.float32)))


def _cast(graph: Graph, equation: Any, value: Value) -> Value:
    import onnx

    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    return _composed(lambda graph, name: graph.add("Cast", name, to=to), graph, equation, value)


def _round(graph: Graph, equation: Any, value: Value) -> Value:
    if int(equation.params["rounding_method"]) != 1:
        raise NotImplementedError("rounding halves away from zero")
    return elementwise("Round", graph, equation, value)


def _clamp(graph: Graph, equation: Any, low: Value, value: Value, high: Value) -> Value:
    return elementwise("Min", graph, equation, elementwise("Max", graph, equation, value, low), high)


def reduce(operation: str, graph: Graph, equation: Any, value: Value) -> Value:
    """Reduce over axes."""
    axes, shape = sorted(equation.params["axes"]), equation.outvars[0].aval.shape
    order = [sum(other < axis for other in range(axis) if other not in axes) for axis in value.order if axis not in axes]
    if value.summed and value.summed[0] == "tiles" and axes == [2, 4] and operation == "ReduceSum":
        _, name, attributes, count = value.summed
        mean = ("AveragePool", [name], attributes, count)
        total = graph.add("Mul", graph.add("AveragePool", name, **attributes), graph.constant(np.float32(count)))
        return node_value(total, shape, CHANNELS_FIRST, summed=mean)
    name = graph.stored(value, value.order, whole=bool(value.ones))
    positions = graph.numbers(*(value.order.index(axis) for axis in axes))
    sizes = [value.shape[axis] for axis in axes]
    count = None if is_symbolic(*sizes) else math.prod(sizes)
    mean = ("ReduceMean", [name, positions], {"keepdims": 0}, count) if operation == "ReduceSum" and count else None
    return node_value(graph.add(operation, name, positions, keepdims=0), shape, order, summed=mean)


def pool(operation: str, graph: Graph, equation: Any, value: Value) -> Value:
    """Reduce over windows of height and width, with explicit padding."""
    params, spatial = equation.params, slice(1, 3)
    window, strides, padding = (list(params[key]) for key in ("window_dimensions", "window_strides", "padding"))
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    if len(window) != 4 or dilated or (window[0], window[3], strides[0], strides[3]) != (1, 1, 1, 1):
        raise NotImplementedError("windows over other axes than height and width, or with dilation")
    (top, bottom), (left, right) = padding[spatial]
    attributes = {"kernel_shape": window[spatial], "strides": strides[spatial], "pads": [top, left, bottom, right]}
    name = graph.stored(value, CHANNELS_FIRST, whole=bool(value.ones))
    if operation == "MaxPool":
        name = graph.add(operation, name, **attributes)
    else:
        count = np.float32(math.prod(window))
        name = graph.add("Mul", graph.add(operation, name, count_include_pad=1, **attributes), graph.constant(count))
    return node_value(name, equation.outvars[0].aval.shape, CHANNELS_FIRST)


def convolution(graph: Graph, equation: Any, value: Value, kernel: Value) -> Value:
    """Write a convolution, with the axes that its dimension numbers name."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    if params["batch_group_count"] != 1 or {*params["lhs_dilation"]} - {1}:
        raise NotImplementedError("a transposed convolution, or one with groups of the batch")
    low, high = zip(*params["padding"], strict=True)
    name = graph.add(
        "Conv",
        graph.stored(value, numbers.lhs_spec, whole=True),
        graph.stored(kernel, numbers.rhs_spec, whole=True),
        kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=list(params["window_strides"]),
        pads=[*low, *high],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return node_value(name, equation.outvars[0].aval.shape, numbers.out_spec)


def product(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Write a matrix product over one axis."""
    summed, batch = equation.params["dimension_numbers"]
    if any(map(len, batch)) or len(right.shape) != 2 or len(summed[0]) != 1:
        raise NotImplementedError("a product of batches of matrices")
    (one,), (other,) = summed
    order = [*(axis for axis in range(len(left.shape)) if axis != one), one]
    name = graph.add("MatMul", graph.stored(left, order, whole=True), graph.stored(right, (other, 1 - other), whole=True))
    shape = equation.outvars[0].aval.shape
    return node_value(name, shape, range(len(shape)))


def _size(graph: Graph, equation: Any) -> Value:
    name = graph.add("Squeeze", graph.size(equation.params["dim"]), graph.numbers(0))
    return node_value(graph.add("Cast", name, to=6), (), ())  # 6: int32, as in JAX


def _range(graph: Graph, equation: Any, *_: Value) -> Value:
    import onnx

    (size,) = equation.params["shape"]
    zero, one = (graph.constant(np.int64(number)) for number in (0, 1))
    name = graph.add("Range", zero, graph.add("Squeeze", graph.size(size), graph.numbers(0)), one)
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["dtype"]))
    return node_value(graph.add("Cast", name, to=to), (size,), (0,))


def _same(graph: Graph, equation: Any, value: Value) -> Value:
    del graph, equation
    return value


OPERATIONS: dict[str, Callable[..., Value]] = {
    **{
        name: partial(elementwise, operation)
        for name, operation in {
            "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
            "neg": "Neg", "abs": "Abs", "sign": "Sign", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh", "erf": "Erf",
            "floor": "Floor", "ceil": "Ceil", "logistic": "Sigmoid", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less",
            "le": "LessOrEqual", "eq": "Equal", "and": "And", "or": "Or", "not": "Not", "select_n": "Where",
        }.items()
    },
    "square": partial(_composed, lambda graph, name: graph.add("Mul", name, name)),
    "rsqrt": partial(_composed, lambda graph, name: graph.add("Reciprocal", graph.add("Sqrt", name))),
    "integer_pow": _power,
    "convert_element_type": _cast,
    "round": _round,
    "clamp": _clamp,
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "squeeze": reshape,
    "expand_dims": reshape,
    "transpose": transpose,
    "reduce_sum": partial(reduce, "ReduceSum"),
    "reduce_max": partial(reduce, "ReduceMax"),
    "reduce_min": partial(reduce, "ReduceMin"),
    "reduce_window_sum": partial(pool, "AveragePool"),
    "reduce_window_max": partial(pool, "MaxPool"),
    "conv_general_dilated": convolution,
    "dot_general": product,
    "concatenate": concatenate,
    "stack": stack,
    "tile": tile,
    "slice": cut,
    "rev": reverse,
    "pad": pad,
    "gather": gather,
    "dim_as_value": _size,
    "iota": _range,
    "stop_gradient": _same,
    "copy": _same,
    "optimization_barrier": _same,
}  # fmt: skip
