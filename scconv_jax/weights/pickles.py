"""A restricted unpickler for plain data and for the few functions that its caller admits.

Python's own unpickler imports and calls any name in a file. PyTorch's `weights_only` loader does not, but before 2.6 a
file could make it run code (CVE-2025-32434) and before 2.10 corrupt its memory (CVE-2026-24747); it unpacks archives that grow
a thousandfold; and it needs torch. This unpickler imports nothing and calls only the functions that its caller passes.
What any other name would make is an `Inert`: it is not built, only its name is kept. It knows the opcodes that weights need, of
protocols 2 to 5 in https://github.com/python/cpython/blob/main/Lib/pickletools.py.

It never recurses. The size of the pickle and the number of opcodes bound its memory, and it checks each declared length against
the bytes that are there.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from scconv_jax.weights.files import WeightsError

MAX_BYTES = 16 << 20
MAX_OPCODES = 1_000_000  # about twenty times as many as the state of a network and its optimizer needs
_MAX_INTEGER = 256  # bytes; a UUID and the state of a random generator need 17


class Global(NamedTuple):
    """A class or function on the stack: its dotted name, and the function to call instead. If None, calls are errors."""

    name: str
    build: Callable[..., Any] | None = None


class Inert(dict[Any, Any]):
    """A class or function that is never called, or an object that is not built: its name, and its items if it is like a dict."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class OddKey:
    """A key of a dict that is neither text nor a short number. It is not hashed by its value, which could take forever."""

    kind: str

    def __str__(self) -> str:
        return self.kind


def unpickle(
    data: bytes,
    start: int,
    find_name: Callable[[str], Global | Inert],
    load_persistent: Callable[[Any], Any],
) -> tuple[Any, int]:
    """Return the value of the pickle at offset `start` of `data`, and the offset at which the pickle ends.

    `find_name` returns what a dotted name stands for, or raises a `WeightsError`. A `Global` with a function may be called. An
    `Inert` may be called, instantiated and given a state or items; the result is inert too. `load_persistent` returns the object
    for a persistent identifier.
    """
    unpickler = _Unpickler(data, start, find_name, load_persistent)
    try:
        return unpickler.run(), unpickler.offset
    except WeightsError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise WeightsError(f"its pickle is damaged near byte {unpickler.offset}") from error


@dataclasses.dataclass(eq=False)
class _Unpickler:
    data: bytes
    offset: int
    find_name: Callable[[str], Global | Inert]
    load_persistent: Callable[[Any], Any]

    def __post_init__(self) -> None:
        self.end = min(len(self.data), self.offset + MAX_BYTES)
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []  # one per open mark
        self.memo: dict[int, Any] = {}
        self.opcodes_left = MAX_OPCODES

    def run(self) -> Any:
        while True:
            self.count_opcodes(1)
            opcode = self.take(1)
            if opcode == pickle.STOP:
                value = self.stack.pop()
                if self.stack or self.outer_stacks:
                    raise WeightsError("its pickle leaves more than one value on the stack")
                return value
            if opcode not in _OPCODES:
                raise WeightsError(f"its pickle is damaged or not of PyTorch: opcode {opcode!r} at byte {self.offset - 1}")
            _OPCODES[opcode](self)

    def count_opcodes(self, count: int) -> None:
        self.opcodes_left -= count
        if self.opcodes_left < 0:
            raise WeightsError(f"its pickle has more than {MAX_OPCODES:,} opcodes, more than any state dict needs")

    def take(self, count: int) -> bytes:
        if count < 0 or self.offset + count > self.end:
            raise WeightsError("its pickle ends too early: the file is cut off or damaged")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.offset, min(self.end, self.offset + 1000))
        if end < 0:
            raise WeightsError(f"its pickle is damaged near byte {self.offset}: a name without end")
        return self.take(end + 1 - self.offset)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Return everything above the last mark."""
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def integer(self, size: int) -> None:
        if size > _MAX_INTEGER:
            raise WeightsError(f"its pickle has an integer of {size} bytes, longer than any state dict needs")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def tuple(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise WeightsError(f"its pickle appends to {describe(target)}, not to a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise WeightsError(f"its pickle sets items of {describe(target)}, not of a dict")
        _update(target, zip(items[::2], items[1::2], strict=True))

    def add_to_set(self) -> None:
        """Drop the items of a set, which is inert."""
        self.pop_mark()
        if not isinstance(self.stack[-1], Inert):
            raise WeightsError(f"its pickle adds items to {describe(self.stack[-1])}, not to a set")

    def frozen_set(self) -> None:
        self.pop_mark()
        self.push(Inert("builtins.frozenset"))

    def find_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise WeightsError("its pickle is damaged: a name that is not a string")
        self.push(self.find_name(f"{module}.{name}"))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Inert):
            self.push(Inert(function.name))
        elif isinstance(function, Global) and function.build is not None and type(arguments) is tuple:
            # One call can walk through everything that a million earlier opcodes built, so its arguments count as opcodes.
            self.count_opcodes(len(arguments) + sum(len(item) for item in arguments if isinstance(item, (dict, list, tuple))))
            self.push(function.build(*arguments))
        else:
            raise WeightsError(f"its pickle calls {describe(function)}")

    def instantiate(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], Inert):
            raise WeightsError(f"its pickle makes an object of {describe(self.stack[-1])}")
        self.push(Inert(self.stack.pop().name))

    def set_state(self) -> None:
        """Drop a state. For a state dict, PyTorch stores `_metadata` as the state; for other objects a state may be code."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Inert) and not (isinstance(target, dict) and isinstance(state, dict)):
            raise WeightsError(f"its pickle sets the state of {describe(target)}")

    def protocol(self) -> None:
        protocol = self.number("B")
        if not 2 <= protocol <= 5:
            raise WeightsError(f"its pickle has protocol {protocol}; 2 to 5 can be read")

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def ordered_dict(items: Any = ()) -> dict[Any, Any]:
    """Build the dict for an `OrderedDict` (Python 2 passes its items) or a `Counter` (called with a dict)."""
    result: dict[Any, Any] = {}
    if type(items) not in (dict, list, tuple):  # a tensor is a subclass of tuple here
        raise WeightsError(f"its pickle makes a dict of {describe(items)}")
    _update(result, items.items() if isinstance(items, dict) else items)
    return result


def _update(target: dict[Any, Any], items: Iterable[Any]) -> None:
    for key, value in items:
        # Hashing a deep tuple would recurse, and long integers can be chosen to have equal hashes.
        if not isinstance(key, (str, int, float, bytes, type(None))) or (type(key) is int and abs(key) >= 1 << 64):
            key = OddKey(describe(key))
        if key in target:
            raise WeightsError(f"entry {str(key)[:200]} occurs twice")
        target[key] = value


def describe(value: Any) -> str:
    """Return the name of a global or an inert object, or the type of a value, for messages."""
    return value.name if isinstance(value, (Global, Inert)) else f"a {type(value).__name__}"


_OPCODES: dict[bytes, Callable[[_Unpickler], Any]] = {
    pickle.PROTO: _Unpickler.protocol,
    pickle.FRAME: lambda u: u.number("Q"),
    pickle.NONE: lambda u: u.push(None),
    pickle.NEWTRUE: lambda u: u.push(True),
    pickle.NEWFALSE: lambda u: u.push(False),
    pickle.BININT: lambda u: u.push(u.number("i")),
    pickle.BININT1: lambda u: u.push(u.number("B")),
    pickle.BININT2: lambda u: u.push(u.number("H")),
    pickle.LONG1: lambda u: u.integer(u.number("B")),
    pickle.LONG4: lambda u: u.integer(u.number("I")),
    pickle.BINFLOAT: lambda u: u.push(struct.unpack(">d", u.take(8))[0]),
    pickle.BINUNICODE: lambda u: u.push(u.take(u.number("I")).decode()),
    pickle.SHORT_BINUNICODE: lambda u: u.push(u.take(u.number("B")).decode()),
    pickle.BINUNICODE8: lambda u: u.push(u.take(u.number("Q")).decode()),
    pickle.BINSTRING: lambda u: u.push(u.take(u.number("i")).decode("latin1")),  # Python 2's strings
    pickle.SHORT_BINSTRING: lambda u: u.push(u.take(u.number("B")).decode("latin1")),
    pickle.BYTEARRAY8: lambda u: u.push(u.take(u.number("Q"))),
    pickle.BINBYTES: lambda u: u.push(u.take(u.number("I"))),
    pickle.SHORT_BINBYTES: lambda u: u.push(u.take(u.number("B"))),
    pickle.EMPTY_TUPLE: lambda u: u.push(()),
    pickle.EMPTY_LIST: lambda u: u.push([]),
    pickle.EMPTY_DICT: lambda u: u.push({}),
    pickle.TUPLE1: lambda u: u.tuple(1),
    pickle.TUPLE2: lambda u: u.tuple(2),
    pickle.TUPLE3: lambda u: u.tuple(3),
    pickle.TUPLE: lambda u: u.push(tuple(u.pop_mark())),
    pickle.APPEND: lambda u: u.append([u.stack.pop()]),
    pickle.APPENDS: lambda u: u.append(u.pop_mark()),
    pickle.SETITEM: lambda u: u.set_items([u.stack.pop(-2), u.stack.pop()]),
    pickle.SETITEMS: lambda u: u.set_items(u.pop_mark()),
    pickle.EMPTY_SET: lambda u: u.push(Inert("builtins.set")),
    pickle.FROZENSET: _Unpickler.frozen_set,
    pickle.ADDITEMS: _Unpickler.add_to_set,
    pickle.MARK: _Unpickler.mark,
    pickle.POP: lambda u: u.stack.pop(),
    pickle.POP_MARK: _Unpickler.pop_mark,
    pickle.BINGET: lambda u: u.get(u.number("B")),
    pickle.LONG_BINGET: lambda u: u.get(u.number("I")),
    pickle.BINPUT: lambda u: u.put(u.number("B")),
    pickle.LONG_BINPUT: lambda u: u.put(u.number("I")),
    pickle.MEMOIZE: lambda u: u.put(len(u.memo)),
    pickle.GLOBAL: lambda u: u.find_global(u.line(), u.line()),
    pickle.STACK_GLOBAL: lambda u: u.find_global(u.stack.pop(-2), u.stack.pop()),
    pickle.REDUCE: _Unpickler.call,
    pickle.NEWOBJ: _Unpickler.instantiate,
    pickle.BUILD: _Unpickler.set_state,
    pickle.BINPERSID: lambda u: u.push(u.load_persistent(u.stack.pop())),
}
