"""A machine that reads pickles and can do nothing else: plain data, and objects by the few names that its caller admits.

Python's own unpickler looks up and calls whatever a file names. PyTorch's `weights_only` loader does not, but before 2.6 a
file could make it run code (CVE-2025-32434), and before 2.10 corrupt its memory (CVE-2026-24747); it unpacks an archive
that grows a thousandfold; and it is not there where torch is not. This machine imports nothing and calls only the
functions that it is given; a name that it was not given ends the reading. The opcodes are those of
https://github.com/python/cpython/blob/main/Lib/pickletools.py, protocols 2 to 5, as far as weights need them.

Python's recursion is never used, memory is bounded by the size of the pickle and by the number of its opcodes, and no
declared length is believed before that many bytes have been seen.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from scconv_jax.weights.files import WeightsError

MOST_BYTES = 16 << 20
MOST_OPCODES = 1_000_000  # some twenty times those of a network's and its optimizer's state
_LONGEST_INTEGER = 16  # bytes


class Name(NamedTuple):
    """What stands on the stack for a class or function: its dotted name, and what calling it does here, if anything."""

    text: str
    build: Callable[..., Any] | None = None


class Inert(NamedTuple):
    """An object that is not made: its class alone is known."""

    kind: str


def unpickle(
    data: bytes,
    names: Mapping[str, Name | Inert],
    persistent: Callable[[Any], Any],
    start: int = 0,
    refuse: Callable[[str], str] = str,
) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: bytes that contain the pickle.
        names: what may be named, by dotted name, and what becomes of it. A `Name` with a function may be called; an
            `Inert` may be called, made or given a state, all of which leaves it as it is.
        persistent: called with each persistent identifier; what it returns takes the identifier's place.
        start: where in `data` the pickle begins.
        refuse: says in words why a dotted name, not in `names`, is refused.

    Returns:
        The value, and where in `data` the pickle ends.

    Raises:
        WeightsError: the pickle is damaged, too long, or asks for anything else.
    """
    machine = _Machine(data, start, names, persistent, refuse)
    try:
        return machine.run(), machine.at
    except WeightsError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise WeightsError(f"its pickle is damaged near byte {machine.at}") from error


class _Machine:
    def __init__(
        self,
        data: bytes,
        start: int,
        names: Mapping[str, Name | Inert],
        persistent: Callable[[Any], Any],
        refuse: Callable[[str], str],
    ) -> None:
        self.data, self.at = data, start
        self.end = min(len(data), start + MOST_BYTES)
        self.names, self.persistent, self.refuse = names, persistent, refuse
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.left = MOST_OPCODES

    def run(self) -> Any:
        while True:
            self.spend(1)
            opcode = self.take(1)
            if opcode == pickle.STOP:
                value = self.stack.pop()
                if self.stack or self.marked:
                    raise WeightsError("its pickle makes more than it holds")
                return value
            _OPCODES[opcode](self) if opcode in _OPCODES else self.unknown(opcode)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise WeightsError(f"its pickle has more than {MOST_OPCODES:,} opcodes, which no state dict needs")

    def unknown(self, opcode: bytes) -> None:
        raise WeightsError(f"its pickle is damaged, or of another kind: opcode {opcode!r} at byte {self.at - 1}")

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > self.end:
            raise WeightsError("its pickle ends too early: the file is cut off or damaged")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.end, self.at + 1000))
        if end < 0:
            raise WeightsError(f"its pickle is damaged near byte {self.at}: a name without end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def items(self) -> list[Any]:
        """Everything above the last mark."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def integer(self, size: int) -> None:
        if size > _LONGEST_INTEGER:
            raise WeightsError(f"its pickle has an integer of {size} bytes, which no state dict needs")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def tuple(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise WeightsError(f"its pickle appends to {_kind(self.stack[-1])}, not to a list")
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise WeightsError(f"its pickle sets items of {_kind(target)}, not of a dict")
        _set(target, zip(items[::2], items[1::2], strict=True))

    def add(self) -> None:
        """Pass over what is added to a set, which is not made."""
        self.items()
        if not isinstance(self.stack[-1], Inert):
            raise WeightsError(f"its pickle adds items to {_kind(self.stack[-1])}, not to a set")

    def frozen_set(self) -> None:
        self.items()
        self.push(Inert("builtins.frozenset"))

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise WeightsError("its pickle is damaged: a name that is no text")
        text = f"{module}.{name}"
        if text not in self.names:
            raise WeightsError(self.refuse(text))
        self.push(self.names[text])

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Inert):
            self.push(function)
        elif isinstance(function, Name) and function.build is not None and type(arguments) is tuple:
            # One opcode can hand over again, and have gone through, all that a million others made.
            self.spend(len(arguments) + sum(len(value) for value in arguments if isinstance(value, (dict, list, tuple))))
            self.push(function.build(*arguments))
        else:
            raise WeightsError(f"its pickle calls {_kind(function)}")

    def make(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], Inert):
            raise WeightsError(f"its pickle makes an object of {_kind(self.stack[-1])}")

    def state(self) -> None:
        """PyTorch gives a state dict, which is an OrderedDict, its `_metadata`; to all else a state may be code."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Inert) and not (isinstance(target, dict) and isinstance(state, dict)):
            raise WeightsError(f"its pickle sets the state of {_kind(self.stack[-1])}")

    def protocol(self) -> None:
        protocol = self.number("B")
        if not 2 <= protocol <= 5:
            raise WeightsError(f"its pickle is of protocol {protocol}; 2 to 5 are known")

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def ordered_dict(items: Any = ()) -> dict[Any, Any]:
    """What an `OrderedDict` becomes, whose items Python 2 gives in its call, and a `Counter`, which gives a dict."""
    result: dict[Any, Any] = {}
    if type(items) not in (dict, list, tuple):  # a tensor stands here as a tuple, too
        raise WeightsError(f"its pickle makes a dict of {_kind(items)}")
    _set(result, items.items() if isinstance(items, dict) else items)
    return result


def _set(target: dict[Any, Any], items: Iterable[Any]) -> None:
    for key, value in items:
        # Hashing a deep tuple would recurse, and long integers can be chosen to have the same hash.
        if not isinstance(key, (str, int, float, bytes, type(None))) or (type(key) is int and abs(key) >= 1 << 64):
            raise WeightsError(f"its pickle has a dict with {_kind(key)} as a key")
        if key in target:
            raise WeightsError(f"entry {str(key)[:200]} occurs twice")
        target[key] = value


def _kind(value: Any) -> str:
    return value.text if isinstance(value, Name) else value.kind if isinstance(value, Inert) else f"a {type(value).__name__}"


_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: _Machine.protocol,
    pickle.FRAME: lambda m: m.number("Q"),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("i")),
    pickle.BININT1: lambda m: m.push(m.number("B")),
    pickle.BININT2: lambda m: m.push(m.number("H")),
    pickle.LONG1: lambda m: m.integer(m.number("B")),
    pickle.LONG4: lambda m: m.integer(m.number("I")),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    pickle.BINUNICODE: lambda m: m.push(m.take(m.number("I")).decode()),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.number("B")).decode()),
    pickle.BINUNICODE8: lambda m: m.push(m.take(m.number("Q")).decode()),
    pickle.BINSTRING: lambda m: m.push(m.take(m.number("i")).decode("latin1")),  # Python 2's texts
    pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number("B")).decode("latin1")),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number("I"))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("B"))),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.TUPLE1: lambda m: m.tuple(1),
    pickle.TUPLE2: lambda m: m.tuple(2),
    pickle.TUPLE3: lambda m: m.tuple(3),
    pickle.TUPLE: lambda m: m.push(tuple(m.items())),
    pickle.APPEND: lambda m: m.append([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append(m.items()),
    pickle.SETITEM: lambda m: m.set([m.stack.pop(-2), m.stack.pop()]),
    pickle.SETITEMS: lambda m: m.set(m.items()),
    pickle.EMPTY_SET: lambda m: m.push(Inert("builtins.set")),
    pickle.FROZENSET: _Machine.frozen_set,
    pickle.ADDITEMS: _Machine.add,
    pickle.MARK: _Machine.mark,
    pickle.POP: lambda m: m.stack.pop(),
    pickle.POP_MARK: _Machine.items,
    pickle.BINGET: lambda m: m.get(m.number("B")),
    pickle.LONG_BINGET: lambda m: m.get(m.number("I")),
    pickle.BINPUT: lambda m: m.put(m.number("B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.number("I")),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(m.stack.pop(-2), m.stack.pop()),
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.make,
    pickle.BUILD: _Machine.state,
    pickle.BINPERSID: lambda m: m.push(m.persistent(m.stack.pop())),
}
