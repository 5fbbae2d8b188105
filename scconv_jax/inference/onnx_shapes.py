"""JAX's operations that rearrange values, in ONNX: reshapes, broadcasts, slices, padding, joins, indices.

Each function takes the graph, the equation of the traced function and its input values, and returns the output value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scconv_jax.functional.symbolic import Size, is_symbolic
from scconv_jax.inference.onnx_graph import CHANNELS_FIRST, Graph, Value, may_differ, node_value

_END = np.iinfo(np.int64).max


def broadcast(graph: Graph, equation: Any, value: Value, *_: Value) -> Value:
    """Return the value with its new axes, and those along which it is repeated, of size 1."""
    shape, axes = tuple(equation.params["shape"]), tuple(equation.params["broadcast_dimensions"])
    ones = {axis for axis in range(len(shape)) if axis not in axes and may_differ(shape[axis], 1)}
    ones |= {out for axis, out in enumerate(axes) if value.single(axis) and may_differ(shape[out], 1)}
    added = [axis for axis in range(len(shape)) if axis not in axes]
    if value.data is not None:
        return Value(shape, np.expand_dims(value.data, tuple(added)), ones=frozenset(ones))
    order = [axes[axis] for axis in value.order]
    if len(shape) == 4 and [axis for axis in CHANNELS_FIRST if axis in axes] == order:
        order = list(CHANNELS_FIRST)
    else:
        for axis in added:
            order.insert(order.index(axis - 1) + 1 if axis else 0, axis)
    positions = [position for position, axis in enumerate(order) if axis in added]
    name = graph.add("Unsqueeze", value.name, graph.numbers(*positions)) if positions else value.name
    return Value(shape, name=name, order=tuple(order), ones=frozenset(ones))


def reshape(graph: Graph, equation: Any, value: Value, *_: Value) -> Value:
    """Split and merge axes. They keep their places in the stored order where the axes of each group lie side by side."""
    shape = tuple(equation.outvars[0].aval.shape)
    groups = _groups(value.shape, shape)
    for old, new in groups:
        if len(old) == 2 and len(new) == 1 and value.ones & {*old} == {old[1]}:  # each element of an axis repeated
            return reshape(graph, equation, _repeat(graph, value, old))
    changed = {axis for old, new in groups if (len(old), len(new)) != (1, 1) for axis in old}
    if value.ones & changed:
        value = node_value(
            graph.stored(value, value.order or None, whole=True), value.shape, value.order or range(len(value.shape))
        )
    order = value.order
    positions = [[order.index(axis) for axis in old] for old, _ in groups]
    if any(place != list(range(place[0], place[0] + len(place))) for place in positions if place):
        order = tuple(range(len(value.shape)))
        positions = [list(old) for old, _ in groups]
    starts = {place[0]: new for place, (_, new) in zip(positions, groups, strict=True) if place}
    result = [axis for position in range(len(order)) for axis in starts.get(position, ())]
    for old, new in groups:
        if not old:
            result.insert(result.index(new[0] - 1) + 1 if new[0] else 0, *new)
    kept = {new[0] for old, new in groups if len(old) == len(new) == 1 and old[0] in value.ones}
    like = [1 if axis in value.ones else value.shape[axis] for axis in order]
    sizes = [1 if axis in kept else shape[axis] for axis in result]
    name = graph.add("Reshape", graph.stored(value, order), graph.shape(sizes, like))
    return Value(shape, name=name, order=tuple(result), ones=frozenset(kept), summed=_tiles(graph, value, shape))


def _groups(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shortest runs of old axes that become runs of new axes."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        runs = ((m, n) for total in range(len(old) + len(new) - i - j + 1) for m in range(total + 1) for n in [total - m])
        m, n = next(
            (m, n)
            for m, n in runs
            if m + n and i + m <= len(old) and j + n <= len(new) and math.prod(old[i : i + m]) == math.prod(new[j : j + n])
        )
        found.append((tuple(range(i, i + m)), tuple(range(j, j + n))))
        i, j = i + m, j + n
    return found


def _repeat(graph: Graph, value: Value, axes: tuple[int, ...]) -> Value:
    """Repeat each element along the first of two axes as often as the second has elements, which becomes 1."""
    times, size = value.shape[axes[1]], value.shape[axes[0]]
    order = value.order or tuple(range(len(value.shape)))
    indices = graph.constant(np.repeat(np.arange(size), times))
    name = graph.add("Gather", graph.stored(value, order), indices, axis=order.index(axes[0]))
    shape = tuple({axes[0]: size * times, axes[1]: 1}.get(axis, length) for axis, length in enumerate(value.shape))
    return Value(shape, name=name, order=order, ones=value.ones - {axes[1]})


def _tiles(graph: Graph, value: Value, shape: tuple[Size, ...]) -> tuple[Any, ...] | None:
    """Return how to average over the tiles into which a reshape cuts maps, from (n, h, w, c) to (n, p, k, q, l, c)."""
    if len(value.shape) != 4 or len(shape) != 6 or is_symbolic(shape[2], shape[4]) or value.ones:
        return None
    window = [shape[2], shape[4]]
    whole = shape[0] == value.shape[0] and shape[1] * shape[2] == value.shape[1] and shape[3] * shape[4] == value.shape[2]
    pool = {"kernel_shape": window, "strides": window}
    return ("tiles", graph.stored(value, CHANNELS_FIRST), pool, math.prod(window)) if whole else None


def transpose(graph: Graph, equation: Any, value: Value) -> Value:
    """Reorder the axes without a node."""
    del graph
    permutation = list(equation.params["permutation"])
    ones = frozenset(permutation.index(axis) for axis in value.ones)
    shape = equation.outvars[0].aval.shape
    return Value(tuple(shape), name=value.name, order=tuple(permutation.index(axis) for axis in value.order), ones=ones)


def concatenate(graph: Graph, equation: Any, *values: Value) -> Value:
    """Join values along an axis."""
    order = next((value.order for value in values if value.data is None), tuple(range(len(values[0].shape))))
    names = [graph.stored(value, order, whole=True) for value in values]
    axis = order.index(equation.params["dimension"])
    return node_value(graph.add("Concat", *names, axis=axis), equation.outvars[0].aval.shape, order)


def stack(graph: Graph, equation: Any, *values: Value) -> Value:
    """Join values along a new axis."""
    shape, axis = tuple(equation.outvars[0].aval.shape), equation.params["axis"]
    names = [graph.add("Unsqueeze", graph.stored(value, whole=True), graph.numbers(axis)) for value in values]
    return node_value(graph.add("Concat", *names, axis=axis), shape, range(len(shape)))


def tile(graph: Graph, equation: Any, value: Value) -> Value:
    """Repeat a value along its axes."""
    order, reps = value.order, equation.params["reps"]
    name = graph.add("Tile", graph.stored(value, order, whole=True), graph.numbers(*(reps[axis] for axis in order)))
    return node_value(name, equation.outvars[0].aval.shape, order)


def cut(graph: Graph, equation: Any, value: Value) -> Value:
    """Write a slice."""
    params = equation.params
    return _slice(graph, value, params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(value.shape))


def _slice(graph: Graph, value: Value, starts: Sequence[Any], ends: Sequence[Any], steps: Sequence[int]) -> Value:
    shape = tuple(-(-(end - start) // step) for start, end, step in zip(starts, ends, steps, strict=True))
    axes = [axis for axis, size in enumerate(value.shape) if may_differ(shape[axis], size) and axis not in value.ones]
    order = value.order or tuple(range(len(value.shape)))
    name = graph.stored(value, order)
    if axes:
        until = [_END if not may_differ(ends[axis], value.shape[axis]) else ends[axis] for axis in axes]
        limits = graph.shape(until) if is_symbolic(*until) else graph.numbers(*until)
        numbers = ([starts[axis] for axis in axes], [order.index(axis) for axis in axes], [steps[axis] for axis in axes])
        first, positions, step = (graph.numbers(*map(int, values)) for values in numbers)
        name = graph.add("Slice", name, first, limits, positions, step)
    return Value(shape, name=name, order=order, ones=frozenset(axis for axis in value.ones if may_differ(shape[axis], 1)))


def reverse(graph: Graph, equation: Any, value: Value) -> Value:
    """Reverse the order along axes."""
    axes = [axis for axis in equation.params["dimensions"] if axis not in value.ones]
    positions, back = graph.numbers(*(value.order.index(axis) for axis in axes)), graph.numbers(*(-1 for _ in axes))
    name = graph.add("Slice", value.name, back, graph.numbers(*(-_END for _ in axes)), positions, back)
    return Value(value.shape, name=name, order=value.order, ones=value.ones)


def pad(graph: Graph, equation: Any, value: Value, filling: Value) -> Value:
    """Add a constant around a value, or cut it where the padding is negative."""
    low, high, interior = zip(*equation.params["padding_config"], strict=True)
    if any(interior):
        raise NotImplementedError("padding between elements")
    order = value.order or tuple(range(len(value.shape)))
    pads = graph.numbers(*(int(low[axis]) for axis in order), *(int(high[axis]) for axis in order))
    return node_value(
        graph.add("Pad", graph.stored(value, order, whole=True), pads, graph.stored(filling)),
        equation.outvars[0].aval.shape,
        order,
    )


def gather(graph: Graph, equation: Any, value: Value, indices: Value) -> Value:
    """Take elements along one axis, or a slice that begins at constant indices."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    axes, gone, shape = numbers.start_index_map, numbers.collapsed_slice_dims, equation.outvars[0].aval.shape
    order = value.order or tuple(range(len(value.shape)))
    if len(indices.shape) == 1 and indices.data is not None:
        first = [0] * len(value.shape)
        for axis, index in zip(axes, indices.data.tolist(), strict=True):
            first[axis] = index
        part = _slice(graph, value, first, [a + b for a, b in zip(first, sizes, strict=True)], [1] * len(first))
        if not gone:
            return part
        name = graph.add("Squeeze", part.name, graph.numbers(*(order.index(axis) for axis in gone)))
        kept = [axis for axis in range(len(order)) if axis not in gone]
        ones = frozenset(kept.index(axis) for axis in part.ones if axis in kept)
        return Value(tuple(shape), name=name, order=tuple(kept.index(axis) for axis in order if axis in kept), ones=ones)
    along = axes[0]
    others = tuple(axis for axis in range(len(value.shape)) if axis != along)
    whole = all(not may_differ(sizes[axis], value.shape[axis]) for axis in others)
    if len(indices.shape) != 2 or axes != gone or len(axes) != 1 or numbers.offset_dims != others or not whole:
        raise NotImplementedError("indices of several axes")
    if along in value.ones:
        value = node_value(graph.stored(value, order, whole=True), value.shape, order)
    chosen = graph.add("Squeeze", graph.stored(indices, whole=True), graph.numbers(1))
    if indices.data is None and "CLIP" in str(equation.params["mode"]):
        last = graph.add("Sub", graph.size(value.shape[along]), graph.numbers(1))
        chosen = graph.add("Min", graph.add("Max", graph.add("Cast", chosen, to=7), graph.numbers(0)), last)  # 7: int64
    name = graph.add("Gather", graph.stored(value, order), chosen, axis=order.index(along))
    return Value(tuple(shape), name=name, order=order, ones=value.ones)
