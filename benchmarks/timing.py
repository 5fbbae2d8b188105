"""Alternating timings of functions, and the Markdown record of a benchmark."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import flax
import jax

RESULTS = Path(__file__).parent / "results"


def alternate(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time functions in turn, so that disturbances affect all of them alike. A first call of each is not timed.

    Args:
        functions: Functions by name. Each returns after its work is done.
        rounds: Number of timed calls per function.

    Returns:
        Seconds of each call, by name.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median in milliseconds as text."""
    return f"{1e3 * statistics.median(seconds):.1f}"


def ratio(seconds: Sequence[float], other: Sequence[float]) -> str:
    """Return the median of the round-by-round ratios as text, with their minimum and maximum."""
    ratios = [a / b for a, b in zip(seconds, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def environment() -> str:
    """Return device, cores, versions and date as text."""
    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    if device.platform == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"{processor}, {cores} cores" if device.platform == "cpu" else device.device_kind
    try:
        torch = f"torch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        torch = "no torch"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, {torch}"
    return f"{where}; {versions}; {datetime.date.today().isoformat()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def record(name: str, title: str, text: str) -> None:
    """Print a result and write it to `benchmarks/results/NAME.md`, with its command and environment."""
    page = f"# {title}\n\n`python -m benchmarks.{name}`. {environment()}\n\n{text}\n"
    print(page)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page)
