"""Where the time of a network's program goes: `python -m benchmarks.profile MODEL [--mode infer|fused] [--batch 8]`.

XLA's own trace gives the begin and end of every instruction on every thread. Instructions that run at the same moment share that
moment equally, so the times add up to the run's. Each instruction's kind and source line come from the text of the compiled
program. Beside them stands the floor: the convolutions and matmuls alone, at the rate of a large matmul on this machine. A moment
in which no instruction runs counts as "waiting"; the matmuls that XLA hands to threads of its own run in it.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import scconv_jax
from benchmarks.programs import Program, inference, training_step
from benchmarks.timing import environment, table

ROOT = Path(__file__).parents[1]
RUNS = 3


class Instruction(NamedTuple):
    """What the compiled program's text says about an instruction."""

    kind: str
    source: str  # file, line and function
    multiplies: int  # multiply-adds, of convolutions and matmuls only


def main() -> None:
    """Profile a program and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="name of a network, as in scconv_jax.list_models()")
    parser.add_argument(
        "--mode", choices=("train", "infer", "fused"), default="train", help="training step, inference, or that after `fuse`"
    )
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument("--top", type=int, default=30, help="number of source lines to print")
    options = parser.parse_args()
    train = options.mode == "train"
    try:
        program = (
            training_step(options.model, options.batch, options.size)
            if train
            else inference(options.model, options.batch, options.size, fused=options.mode == "fused")
        )
    except ValueError as error:  # an unknown network, images too small for it
        parser.error(str(error))
    print(f"{options.model}, {options.mode}, batch {options.batch} at {options.size} px, float32; {environment()}\n")
    print(report(program, train, options.top))


def report(program: Program, train: bool, top: int) -> str:
    """Return the tables of a program. In training, its results replace its first arguments in the next run."""
    compiled = program.function.lower(*program.arguments).compile(
        compiler_options=None if train else scconv_jax.inference_options()
    )
    known = instructions(compiled.as_text(), kernel_shapes(program.arguments[0]))
    arguments = program.arguments
    runs = []
    for i in range(RUNS + 1):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                results = jax.block_until_ready(compiled(*arguments))
            if i:
                runs.append(shares(events(folder)))
        if train:
            arguments = (*results, *arguments[len(results) :])
    run = sorted(runs, key=lambda times: sum(times.values()))[RUNS // 2]
    nowhere = Instruction("waiting", "", 0)
    kinds, sources = collections.Counter(), collections.Counter()
    for name, seconds in run.items():
        found = known.get(name, nowhere)
        kinds[found.kind] += seconds
        sources[found.source, found.kind] += seconds
    total, rate = sum(run.values()), matmul_rate()
    needed = collections.Counter()
    for found in known.values():
        needed[found.kind] += found.multiplies
    rows = [
        [kind, f"{1e3 * seconds:.1f}", f"{seconds / total:.1%}", f"{2e3 * needed[kind] / rate:.1f}" if needed[kind] else ""]
        for kind, seconds in kinds.most_common()
    ]
    floor = 2 * sum(needed.values()) / rate
    rows.append(["**all**", f"{1e3 * total:.1f}", "", f"{1e3 * floor:.1f}"])
    lines = [[*place, f"{1e3 * seconds:.1f}"] for place, seconds in sources.most_common(top)]
    return "\n\n".join(
        [
            table(["kind", "ms", "share", f"floor, ms, at {rate / 1e9:.0f} GFLOP/s"], rows),
            table(["source", "kind", "ms"], lines),
        ]
    )


def events(folder: str) -> list[tuple[int, int, str]]:
    """Return begin and end (ns) and name of each instruction in a trace; "" is the whole run."""
    path = next(Path(folder).rglob("*.xplane.pb"))
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                is_run = event.name.startswith("ThunkExecutor::Execute (wait")
                if (is_run or "hlo_op" in stats) and event.start_ns is not None and event.end_ns is not None:
                    found.append((int(event.start_ns), int(event.end_ns), "" if is_run else str(stats["hlo_op"])))
    return found


def shares(found: Iterable[tuple[int, int, str]]) -> dict[str, float]:
    """Return the seconds of each name, if names that are active together share the time equally; "" gets what is left."""
    points = [point for begin, end, name in found for point in ((begin, 1, name), (end, -1, name))]
    seconds: dict[str, float] = collections.defaultdict(float)
    active: collections.Counter[str] = collections.Counter()
    before = 0
    for moment, change, name in sorted(points):
        names = [other for other in active if other] or ([""] if active else [])
        for other in names:
            seconds[other] += (moment - before) / len(names) / 1e9
        active[name] += change
        if not active[name]:
            del active[name]
        before = moment
    return dict(seconds)


def kernel_shapes(params: Any) -> set[tuple[int, ...]]:
    """Return the shapes that gradients of kernels have in a program: (h, w, i, o), XLA's (i, h, w, o), and (i, o) for 1×1."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim in (2, 4)}
    moved = {(i, *window, o) for *window, i, o in shapes if window}
    return shapes | moved | {shape[2:] for shape in shapes if shape[:2] == (1, 1)}


_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)$")


def instructions(text: str, kernels: set[tuple[int, ...]]) -> dict[str, Instruction]:
    """Return the instructions of the entry computation, or of any other that is not fused, by name."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = bodies[match[1]] = []
        elif line.startswith("  "):
            body.append(line)
    places = _places(text)
    return {
        match[1]: _instruction(match, bodies, kernels, places)
        for name, lines in bodies.items()
        if "fused" not in name and "wrapped" not in name
        for match in map(_INSTRUCTION.match, lines)
        if match and match[3] not in ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
    }


def _instruction(match: re.Match[str], bodies: dict[str, list[str]], kernels: set[Any], places: dict[str, str]) -> Instruction:
    name, rest = match[1], match[4]
    called = re.search(r"calls=%([\w.\-]+)", rest)
    inner = bodies.get(called[1], []) if called else [match[0]]
    parts = [found for found in map(_INSTRUCTION.match, inner) if found]
    work = next((part for part in parts if part[3] in ("convolution", "dot")), None)
    text = match[0]
    origin = re.search(r'op_name="([^"]*)"', text) or re.search(r'op_name="([^"]*)"', "\n".join(inner))
    frame = re.search(r"stack_frame_id=(\d+)", text) or re.search(r"stack_frame_id=(\d+)", "\n".join(inner))
    path, place = origin[1] if origin else "", places.get(frame[1], "") if frame else ""
    if work is not None:
        what = "matmul" if work[3] == "dot" else "convolution"
        shape = _shape(work[2])
        backward = "input gradient" if "transpose(" in path else "forward"
        direction = "weight gradient" if shape in kernels else backward
        return Instruction(f"{what}, {direction}", place, _multiplies(work, inner, bodies))
    operations = {part[3] for part in parts}
    if operations & {"reduce-window", "select-and-scatter"} or "pooling.py" in place:
        kind = "pooling"
    elif "optax" in place:
        kind = "optimizer"
    elif "reduce" in operations:
        kind = "sums"
    elif re.match(r"(transpose|copy|wrapped_(transpose|copy|pad|slice|reverse|broadcast)|concatenate)", name):
        kind = "copies and transposes"
    else:
        kind = "elementwise"
    return Instruction(kind, place, 0)


def _multiplies(work: re.Match[str], inner: list[str], bodies: dict[str, list[str]]) -> int:
    """Return the multiply-adds of a convolution or matmul: per element of its result, those of one window or contraction."""
    names = re.findall(r"%([\w.\-]+)", work[4].split("),")[0])
    searched = inner if len(inner) > 1 else [line for lines in bodies.values() for line in lines]
    types = {found[1]: found[2] for found in map(_INSTRUCTION.match, searched) if found and found[1] in names}
    first, second = (_shape(types.get(name, "")) for name in names[:2])
    result = math.prod(_shape(work[2]))
    if work[3] == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", work[4])
        return result * math.prod(first[int(axis)] for axis in axes[1].split(",")) if axes and first else 0
    labels = re.search(r"dim_labels=\w+_(\w+)->", work[4])
    dilated = re.search(r"lhs_dilate=(\d+)x(\d+)", work[4])
    skipped = int(dilated[1]) * int(dilated[2]) if dilated else 1
    return result * math.prod(second) // second[labels[1].index("o")] // skipped if labels and second else 0


def _shape(kind: str) -> tuple[int, ...]:
    match = re.match(r"\w+\[([\d,]*)\]", kind)
    return tuple(int(size) for size in match[1].split(",") if size) if match else ()


def _places(text: str) -> dict[str, str]:
    """Return file, line and function of each stack frame of the program, by its number."""
    tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        rows = text.partition(f"\n{title}\n")[2].partition("\n\n")[0]
        tables[title] = dict(re.findall(r"^(\d+) (.*)$", rows, re.MULTILINE))

    def place(frame: str) -> str:
        location = re.search(r"file_location_id=(\d+)", frame)
        fields: Mapping[str, str] = dict(
            re.findall(r"(\w+)=(\d+)", tables["FileLocations"].get(location[1], "") if location else "")
        )
        file = tables["FileNames"].get(fields.get("file_name_id", ""), "").strip('"')
        function = tables["FunctionNames"].get(fields.get("function_name_id", ""), "").strip('"')
        file = file.removeprefix(f"{ROOT}/").split("site-packages/")[-1]
        return f"{file}:{fields.get('line')} {function}" if file else ""

    return {number: place(frame) for number, frame in tables["StackFrames"].items()}


def matmul_rate() -> float:
    """Return the floating-point operations per second of a large float32 matmul."""
    a = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(seconds)


if __name__ == "__main__":
    main()
