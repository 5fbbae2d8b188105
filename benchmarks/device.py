"""What there is to know about a GPU or TPU, measured in one call of under eight minutes, without a network connection.

    python -m benchmarks.device           # on the CPU: a small form, which shows only that the measurements work
    python -m benchmarks.device --small   # the small form on any device

Every measurement is a process of its own with a time limit, because XLA can abort a process or compile for minutes. The record,
`benchmarks/results/device.json` and `device.md`, is written anew after each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scconv_jax
from benchmarks.device_measurements import FORMS
from benchmarks.timing import RESULTS, table

BUDGET = 470.0
"""Seconds for all measurements."""
MEASURE = (sys.executable, "-m", "benchmarks.device_measurements")
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


@dataclass(frozen=True)
class Step:
    """A measurement: the command prints its result as JSON on its last line."""

    name: str
    command: Sequence[str]
    seconds: float
    """Time limit."""
    environment: dict[str, str] = field(default_factory=dict)


def plan_steps(form: str) -> list[Step]:
    """Return the measurements in the order in which they matter if the time runs out."""

    def step(seconds: float, name: str, *words: str, **environment: str) -> Step:
        return Step(name, [*MEASURE, form, *words], seconds, environment)

    resnet, scnet, scconv = (
        [step(80, f"{name}, JAX", "speed", name), step(90, f"{name}, PyTorch", "torch_speed", name)]
        for name in FORMS[form].networks
    )
    equal = [step(90, f"{name} against float64", "equality", name, str(n), str(size)) for name, n, size in FORMS[form].equal]
    bits = [step(60, f"bits of two deterministic runs: {run}", "bits", **DETERMINISTIC) for run in ("first", "second")]
    return [equal[0], *resnet, *scnet, *bits, step(120, "digits", "digits"), *scconv, *equal[1:]]


def run_step(step: Step, seconds: float) -> dict[str, Any]:
    """Run a measurement for at most `seconds` and return its status, time and result; a failure is a result too."""
    start = time.monotonic()
    environment, pipe = os.environ | step.environment, subprocess.PIPE
    process = subprocess.Popen(step.command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, errors = process.communicate(timeout=seconds)
        lines = out.splitlines() or [""]
        try:
            found = {"status": "done", "result": json.loads(lines[-1])} if process.returncode == 0 else {}
        except ValueError:
            found = {}
        if not found:
            last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
            found = {"status": "failed", "reason": f"exit code {process.returncode}: {last}"}
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too
        process.communicate()
        found = {"status": "failed", "reason": f"stopped after its limit of {seconds:.3g} s"}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def measure(steps: Sequence[Step], head: dict[str, Any], folder: Path, budget: float) -> dict[str, Any]:
    """Run the measurements one after the other, write the record after each, and return it."""
    deadline = time.monotonic() + budget
    record: dict[str, Any] = {**head, "measurements": {step.name: {"status": "not run"} for step in steps}}
    write(record, folder)
    for step in steps:
        left = deadline - time.monotonic()
        if left > 1:
            print(f"{step.name} ...", flush=True)
            record["measurements"][step.name] = run_step(step, min(step.seconds, left))
            write(record, folder)
    return record


def write(record: dict[str, Any], folder: Path) -> None:
    """Write `device.json` and `device.md`, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with scconv_jax.files.replacing(folder / "device.json") as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    with scconv_jax.files.replacing(folder / "device.md") as file:
        file.write_text(page(record))


def page(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    lines = ["# On a device", "", f"`python -m benchmarks.device`. {record['environment']}", ""]
    if record.get("platform") == "cpu":
        lines += ["**GPU and TPU: not measured.** The small form on a CPU shows only that the measurements work.", ""]
    lines += [f"{record['form']}. Devices: {record['devices']}; memory that JAX can use on each: {record['memory for JAX']}.", ""]
    rows = []
    for name, found in record["measurements"].items():
        results = found.get("result", {})
        rows.append([name, found["status"], f"{found['seconds']:.0f} s" if "seconds" in found else "", found.get("reason", "")])
        rows += [["", key, shown(key, value), ""] for key, value in results.items()]
    lines.append(
        table(["measurement", "status or quantity", "value", "reason"], [[c.replace("|", "\\|") for c in row] for row in rows])
    )
    for name in FORMS["full"].networks + FORMS["small"].networks:
        both = [record["measurements"].get(f"{name}, {library}", {}).get("result", {}) for library in ("JAX", "PyTorch")]
        for key in (f"{work}, images/s" for work in ("training", "inference")):
            if all(key in found for found in both) and record["platform"] != "cpu":
                lines += ["", f"{name}, {key}: JAX / PyTorch {both[0][key] / both[1][key]:.2f}."]
    digests = [found["result"] for name, found in record["measurements"].items() if "bits" in name and "result" in found]
    if len(digests) == 2:
        same = "the same bits" if digests[0] == digests[1] else "DIFFERENT bits"
        lines += ["", f"Two runs with `{DETERMINISTIC['XLA_FLAGS']}`, each a process of its own: {same}."]
    return "\n".join(lines) + "\n"


def shown(key: str, value: Any) -> str:
    """Return a value as text."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, str):
        return value
    if "memory" in key:
        return f"{value / 1e9:.2f} GB"
    if "share" in key or key == "top-1":
        return f"{100 * value:.1f} %"
    return f"{value:,.1f}" if value >= 1 else f"{value:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and return the exit code, 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small networks and batches; always so on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default: benchmarks/results)")
    options = parser.parse_args(argv)
    began = time.monotonic()
    found = run_step(Step("device", [*MEASURE, "full", "device"], 90), 90)
    if found["status"] != "done":
        print(f"error: JAX does not start here: {found['reason']}", file=sys.stderr)
        return 1
    form = "small" if options.small or found["result"]["platform"] == "cpu" else "full"
    what = f"{form.title()} form: bfloat16, {FORMS[form].batch} images of {FORMS[form].size} px on each device"
    record = measure(plan_steps(form), found["result"] | {"form": what}, options.out, BUDGET - (time.monotonic() - began))
    print(page(record))
    return 0 if all(step["status"] == "done" for step in record["measurements"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
