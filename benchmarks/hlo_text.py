"""Reads the text of a compiled XLA program: kernels, the bytes that each reads and writes, collectives."""

from __future__ import annotations

import collections
import math
import re
from typing import Any, NamedTuple

SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)")
_FUSED = re.compile(r"^%(\S+) \(.*?\) -> .*? \{\n(.*?)\n\}", re.MULTILINE | re.DOTALL)


class Kernel(NamedTuple):
    """An instruction of the program's entry computation that does something."""

    name: str
    kind: str
    result: str
    bytes: int
    source: str


def figures(text: str, top: int) -> dict[str, Any]:
    """Return the figures of a program's text that do not depend on the device."""
    found = kernels(text)
    moved = [kernel for kernel in found if re.search("transpose|copy|convert|pad", kernel.name)]
    kinds: dict[str, int] = collections.Counter()
    for kernel in found:
        kinds[kernel.kind] += kernel.bytes
    largest = sorted(found, key=lambda kernel: -kernel.bytes)[:top]
    return {
        "kernels": len(found),
        "kernel_bytes": sum(kernel.bytes for kernel in found),
        "bytes_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])[:8]),
        "moved_kernels": len(moved),
        "moved_bytes": sum(kernel.bytes for kernel in moved),
        "collectives": collectives(text),
        "largest": [
            {"bytes": kernel.bytes, "kind": kernel.kind, "result": kernel.result, "source": kernel.source} for kernel in largest
        ],
    }


def kernels(text: str) -> list[Kernel]:
    """Return the kernels of the entry computation. Those that end an asynchronous operation count with the one that begins it.

    Of an operand that a fusion only slices, the slices count.
    """
    sizes: dict[str, int] = {}
    result = []
    read_by_fusions = {name: parts_read(body) for name, body in _FUSED.findall(text)}
    for line in text[text.index("ENTRY") :].splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, kind, operation, rest = match.groups()
        sizes[name] = bytes_of(kind)
        if operation in FREE or operation.endswith("-done"):
            continue
        fused = re.search(r"calls=%([\w.\-]+)", line)
        parts = read_by_fusions.get(fused[1], {}) if fused else {}
        operands = re.findall(r"%([\w.\-]+)", _operands(rest))
        read = sum(round(sizes.get(operand, 0) * parts.get(i, 1)) for i, operand in enumerate(operands))
        target = re.search(r'custom_call_target="([^"]*)"', line)
        source = re.search(r'op_name="([^"]*)"', line)
        full = f"{operation}:{target[1]}" if target else operation
        result.append(Kernel(name, full, kind[:60], sizes[name] + read, source[1][-90:] if source else ""))
    return result


def parts_read(body: str) -> dict[int, float]:
    """Return which part of each parameter a fusion reads, where it reads only slices of it: `{number: part}`."""
    users: dict[str, list[tuple[str, str, int]]] = collections.defaultdict(list)
    parameters: dict[int, tuple[str, int]] = {}
    for line in body.splitlines():
        if match := _INSTRUCTION.match(line):
            name, kind, operation, rest = match.groups()
            if operation == "parameter":
                parameters[int(_operands(rest))] = name, elements(kind)
            for operand in re.findall(r"%([\w.\-]+)", _operands(rest)):
                users[operand].append((operation, name, elements(kind)))

    def read(name: str, size: int) -> int:
        """Return the elements of a value of this size that its users read."""
        needed = 0
        for operation, user, result in users[name]:
            needed += result if operation == "slice" else read(user, size) if operation in ("convert", "bitcast") else size
        return min(needed or size, size)

    parts = {number: read(name, size) / max(size, 1) for number, (name, size) in parameters.items()}
    return {number: part for number, part in parts.items() if part < 1}


def collectives(text: str) -> dict[str, Any]:
    """Return number and bytes of all collectives, wherever they stand in the program."""
    count, total = 0, 0
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match and match[3].removesuffix("-start") in COLLECTIVES:
            count += 1
            # An asynchronous one returns its operands too.
            total += bytes_of(match[2]) // (2 if match[3].endswith("-start") and match[2].startswith("((") else 1)
    return {"count": count, "bytes": total}


def bytes_of(kind: str) -> int:
    """Return the bytes of an array's or tuple's type, such as `(f32[64,3], bf16[8])`."""
    return sum(SIZES.get(dtype, 1) * size for dtype, size in _arrays(kind))


def elements(kind: str) -> int:
    """Return the number of elements of an array's or tuple's type."""
    return sum(size for _, size in _arrays(kind))


def _arrays(kind: str) -> list[tuple[str, int]]:
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", kind)
    return [(dtype, math.prod(int(size) for size in shape.split(",") if size)) for dtype, shape in arrays]


def _operands(rest: str) -> str:
    """Return the text up to the parenthesis that closes the operands."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:i]
    return rest
