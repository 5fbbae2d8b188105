"""An ONNX graph while it is built: its nodes, its constants, and the values that the operations read.

A value knows in which order its axes are stored. Convolutions and pools of ONNX take channels first, those here channels last,
so maps stay stored with channels first from one convolution to the next, and a transposition is written only where an operation
needs another order. A broadcast is not written either: its new axes stay of size 1 until an operation needs them whole.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scconv_jax.functional.symbolic import Size, is_symbolic

CHANNELS_FIRST = (0, 3, 1, 2)
_FOLDED = 2**20  # largest broadcast constant, in elements


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the traced function: a constant, or an output of a node.

    Attributes:
        shape: Its shape in the traced function; sizes may be symbolic.
        data: The constant, with the axes of the traced function, and of size 1 along `ones`. None for the output of a node.
        name: Name of the node's output.
        order: Axis `i` of the stored tensor is axis `order[i]` of the traced function.
        ones: Axes that are stored with size 1 because the tensor is constant along them.
        summed: For a sum over windows or axes: operation and attributes that give the mean, its input, and the count.
    """

    shape: tuple[Size, ...]
    data: np.ndarray | None = None
    name: str = ""
    order: tuple[int, ...] = ()
    ones: frozenset[int] = frozenset()
    summed: tuple[Any, ...] | None = None

    def whole(self) -> np.ndarray | None:
        """Return the constant in its full shape; None if it is none, or too large to be folded."""
        if self.data is None or not self.ones:
            return self.data
        if is_symbolic(*self.shape) or np.prod(self.shape) > _FOLDED:
            return None
        return np.broadcast_to(self.data, self.shape)

    def single(self, axis: int) -> bool:
        """Return whether the tensor is stored with size 1 along an axis."""
        return axis in self.ones or (not is_symbolic(self.shape[axis]) and self.shape[axis] == 1)


class Graph:
    """Nodes and constants in the order in which they are written."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.scope = ""
        self.symbols: dict[str, str] = {}  # the symbol of a size to the node's output that has it, int64 (1,)
        self._known: dict[Any, str] = {}
        self._names: dict[str, int] = {}

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """Write a node and return the name of its output."""
        name = self._unique(operation)
        self.nodes.append(self._onnx.helper.make_node(operation, inputs, [name], name=name, **attributes))
        return name

    def constant(self, array: Any) -> str:
        """Return the name of a constant."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest())
        if key not in self._known:
            self._known[key] = name = self._unique("constant")
            self.constants[name] = self._onnx.numpy_helper.from_array(array, name)
        return self._known[key]

    def numbers(self, *values: int) -> str:
        """Return the name of a constant of int64 numbers."""
        return self.constant(np.array(values, np.int64))

    def stored(self, value: Value, order: Sequence[int] | None = None, *, whole: bool = False) -> str:
        """Return the name of a tensor that holds the value with its axes in the given order (default: that of the function).

        Axes of `value.ones` have size 1, unless it is to be `whole`.
        """
        wanted = tuple(range(len(value.shape)) if order is None else order)
        if value.data is not None:
            name = self.constant(value.data.transpose(wanted) if wanted else value.data)
        elif value.order == wanted:
            name = value.name
        else:
            name = self.add("Transpose", value.name, perm=[value.order.index(axis) for axis in wanted])
        if whole and value.ones:
            name = self.add("Expand", name, self.shape([value.shape[axis] for axis in wanted]))
        return name

    def written(self, value: Value) -> Value:
        """Return a constant as if a node had computed it."""
        axes = tuple(range(len(value.shape)))
        return Value(value.shape, name=self.constant(value.data), order=axes, ones=value.ones)

    def shape(self, sizes: Sequence[Size], like: Sequence[Size] = ()) -> str:
        """Return the name of a shape, int64. In the shape of a Reshape of a tensor whose sizes are `like`, 0 copies a size."""
        numbers: list[int] = []
        for axis, size in enumerate(sizes):
            same = axis < len(like) and is_symbolic(size) and size == like[axis]
            numbers.append(0 if same else -1 if is_symbolic(size) else size)
        if -1 not in numbers or (like and numbers.count(-1) == 1):
            return self.numbers(*numbers)
        return self.add("Concat", *map(self.size, sizes), axis=0)

    def size(self, size: Size) -> str:
        """Return the name of an int64 tensor (1,) with a size, which may be symbolic."""
        return self._evaluate(ast.parse(str(size).replace("^", "**"), mode="eval").body)

    def name_sizes(self, name: str, stored: Sequence[Size]) -> None:
        """Make the symbols in the shape of an input known. Its sizes are symbols, or multiples of them such as 32*h."""
        for axis, size in enumerate(stored):
            found = re.fullmatch(r"(?:(\d+)\*)?([A-Za-z_]\w*)", str(size))
            if found and found[2] not in self.symbols:
                value = self.add("Shape", name, start=axis, end=axis + 1)
                self.symbols[found[2]] = self.add("Div", value, self.numbers(int(found[1]))) if found[1] else value

    def _evaluate(self, node: ast.expr) -> str:
        operations: dict[Any, str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow"}
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return self.numbers(node.value)
        if isinstance(node, ast.Name) and node.id in self.symbols:
            return self.symbols[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in operations:
            return self.add(operations[type(node.op)], self._evaluate(node.left), self._evaluate(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self.add("Neg", self._evaluate(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # sizes are not negative, so Div rounds down
            called = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}
            return self.add(called[node.func.id], *map(self._evaluate, node.args))
        raise ValueError(f"The symbolic size {ast.unparse(node)} cannot be written in ONNX.")

    def _unique(self, kind: str) -> str:
        base = f"{self.scope}/{kind}" if self.scope else kind
        number = self._names[base] = self._names.get(base, 0) + 1
        return base if number == 1 else f"{base}_{number}"


def node_value(name: str, shape: Sequence[Size], order: Sequence[int], **options: Any) -> Value:
    """Return the value that a node's output has, stored in the given order."""
    return Value(tuple(shape), name=name, order=tuple(order), **options)


def may_differ(size: Size, other: Size) -> bool:
    """Return whether two sizes differ, or may differ."""
    return not bool(size == other)
