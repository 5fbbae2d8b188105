"""Networks and operators against PyTorch: inference and a training step, float32, two kinds of PyTorch and two of this project.

    eager      PyTorch, channels_last, one thread per core
    compiled   the same under `torch.compile`, where a C++ compiler is installed
    jax        this project; inference with `inference_options()`
    fused      inference after `scconv_jax.fuse`

All run in one process and in turn, so that disturbances affect all alike; the ratios are medians of those of neighbours.
`torch.compile` has its turns with eager PyTorch only, at the end: in turn with it, a step of SCNet-50 in JAX took 1.6 times as
long. Both sides run the same network on the same images and the same step: cross-entropy, SGD with momentum 0.9 and weight decay
1e-4. The time to the first result, from the start of building the network, and the peak memory, above that of the imports, are
measured in a process for each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.networks_report import quote, write

NETWORKS = ("resnet50", "scnet50", "scnet50_v1d", "scconv_resnet50")
OPERATORS = ("SelfCalibratedConv", "ScConv")
BATCHES = (1, 8, 32)
WORKS = ("inference", "step")
KINDS = ("eager", "compiled", "jax", "fused")
SIZE = 224
OPERATOR_SHAPE = (256, 14)
"""Channels and pixels of the operators alone: those of the third stage."""
SECONDS = 12
"""Time spent on a comparison, in at least three rounds."""

Call = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 8, few rounds, no torch.compile, nothing recorded")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NAME", help="networks (default: all)")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, metavar="N", help="batches (default: 1 8 32)")
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of the images in pixels (default: 224)")
    parser.add_argument("--quote", action="store_true", help="measure nothing; write the recorded table into README.md")
    parser.add_argument("--alone", nargs=4, metavar=("KIND", "NAME", "WORK", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args([] if arguments is None else arguments)
    if options.quote:
        quote()
        return
    if options.alone:
        kind, name, work, batch = options.alone
        print(json.dumps(alone(kind, name, work, int(batch), options.size)))
        return
    began = time.perf_counter()
    batches = (8,) if options.quick else options.batches
    command = " ".join(["python -m benchmarks.networks", *(arguments or [])])
    record: dict[str, Any] = {"command": command, "size": options.size, "speed": [], "start": []}
    jobs = [(name, batch, work) for name in options.networks for batch in batches for work in WORKS]
    # The norm of a pooled map of 1 px needs two images in training.
    jobs = [job for job in jobs if job[1:] != (1, "step")] + [(name, 8, work) for name in OPERATORS for work in WORKS]
    for name, batch, work in jobs:
        kinds = [kind for kind in kinds_of(work) if kind != "compiled" and (kind != "fused" or name not in OPERATORS)]
        found = compare(kinds, name, work, batch, options.size, 2 if options.quick else SECONDS)
        record["speed"].append({"name": name, "batch": batch, "work": work, **found})
        print(name, batch, work, found, flush=True)
    # Last, because it slows the other kinds down (see above). Another batch compiles anew, in a minute or more for each step.
    for row in [] if options.quick else record["speed"]:
        if row["batch"] == 8 and "compiled" in kinds_of(row["work"]):
            found = compare(("eager", "compiled"), row["name"], row["work"], 8, options.size, SECONDS)
            row["compiled"] = found["compiled"]
            print(row["name"], 8, row["work"], found, flush=True)
    for name in () if options.quick else options.networks:
        for work in WORKS:
            for kind in kinds_of(work):
                found = in_a_process(kind, name, work, options.size)
                record["start"].append({"name": name, "work": work, "kind": kind, **found})
                print(name, work, kind, found, flush=True)
    record["minutes"] = round((time.perf_counter() - began) / 60, 1)
    if options.quick:
        print(f"{record['minutes']} minutes; with --quick nothing is recorded")
    else:
        write(record)


def kinds_of(work: str) -> list[str]:
    """Return the kinds that can do a work here."""
    import scconv_jax

    usable = {"compiled": bool(shutil.which("g++") or shutil.which("clang++"))}
    usable["fused"] = work == "inference" and hasattr(scconv_jax, "fuse")
    return [kind for kind in KINDS if usable.get(kind, True)]


def compare(kinds: Iterable[str], name: str, work: str, batch: int, size: int, seconds: float) -> dict[str, Any]:
    """Return the median milliseconds of each kind, and the median, least and greatest of its ratios to eager PyTorch."""
    calls = {kind: make(kind, name, work, batch, size) for kind in kinds}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    began = time.perf_counter()
    while len(times["eager"]) < 3 or (time.perf_counter() - began < seconds and len(times["eager"]) < 51):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            times[kind].append(time.perf_counter() - start)
    found: dict[str, Any] = {"rounds": len(times["eager"])}
    for kind, own in times.items():
        ratios = [a / b for a, b in zip(own, times["eager"], strict=True)]
        found[kind] = {
            "ms": round(1e3 * statistics.median(own), 2),
            "ratio": [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))],
        }
    return found


def make(kind: str, name: str, work: str, batch: int, size: int) -> Call:
    """Return a call that does the work once and waits for its end."""
    if kind in ("jax", "fused"):
        return of_jax(name, work, batch, size, fused=kind == "fused")
    return of_torch(name, work, batch, size, compiled=kind == "compiled")


def of_jax(name: str, work: str, batch: int, size: int, *, fused: bool) -> Call:
    """Return a call of this project."""
    import jax

    import scconv_jax
    from benchmarks import programs

    if name in OPERATORS:
        channels, pixels = OPERATOR_SHAPE
        layer: Any = scconv_jax.SelfCalibratedConv(channels) if name == "SelfCalibratedConv" else scconv_jax.ScConv()
        x = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, channels))
        program = programs.layer(layer, x, step=work == "step")
    elif work == "step":
        program = programs.training_step(name, batch, size)
    else:
        program = programs.inference(name, batch, size, fused=fused)
    options = scconv_jax.inference_options() if work == "inference" else None
    compiled = program.function.lower(*program.arguments).compile(compiler_options=options)
    arguments = list(program.arguments)
    del program  # a step donates its state, and nothing else may hold it

    def call() -> None:
        results = jax.block_until_ready(compiled(*arguments))
        if work == "step" and name not in OPERATORS:
            arguments[: len(results)] = results

    return call


def of_torch(name: str, work: str, batch: int, size: int, *, compiled: bool) -> Call:
    """Return a call of PyTorch."""
    import os

    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import numpy as np
    import torch

    from benchmarks import programs
    from tests.reference import networks, scconv, scnet

    if name in OPERATORS:
        channels, pixels = OPERATOR_SHAPE
        module: Any = scconv.ScConv(channels) if name == "ScConv" else scnet.SelfCalibratedConv(channels)
        images, labels = np.random.default_rng(0).normal(size=(batch, pixels, pixels, channels)).astype(np.float32), None
    else:
        module, (images, labels) = networks.build(name), programs.batch(batch, size)
    module = module.to(memory_format=torch.channels_last)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view: the memory stays channels last
    module.train(work == "step")
    forward = torch.compile(module) if compiled else module
    if work == "inference":

        def infer() -> None:
            with torch.inference_mode():
                forward(x)

        return infer
    if labels is None:
        x = x.requires_grad_()

        def both_ways() -> None:
            module.zero_grad()
            x.grad = None
            forward(x).square().sum().backward()

        return both_ways
    y = torch.from_numpy(labels)
    optimiser = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(forward(x), y).backward()
        optimiser.step()

    return step


def alone(kind: str, name: str, work: str, batch: int, size: int) -> dict[str, float]:
    """Return the seconds from building the network to its first result, and the peak memory of later calls in MB.

    The memory is counted above that of the imports.
    """
    for module in ("jax", "torch", "scconv_jax", "tests.reference.networks"):
        importlib.import_module(module)
    imported = memory("VmRSS")
    began = time.perf_counter()
    call = make(kind, name, work, batch, size)
    call()
    first = time.perf_counter() - began
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compilation has freed goes back to the system,
    Path("/proc/self/clear_refs").write_text("5")  # and its peak is forgotten
    for _ in range(3):
        call()
    return {"first_s": round(first, 1), "peak_mb": round(memory("VmHWM") - imported)}


def memory(field: str) -> float:
    """Return a figure of this process's memory in MB: VmRSS, what it holds, or VmHWM, the peak of that."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else 0.0


def in_a_process(kind: str, name: str, work: str, size: int) -> dict[str, float]:
    """Return the figures of `alone`, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.networks", "--size", str(size), "--alone", kind, name, work, "8"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
