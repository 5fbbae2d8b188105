"""Writes `compiled.json`, `compiled.md` and `compiled.png` in `benchmarks/results`: the figures of compiled programs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.compiled import PLAIN, RESULTS, TARGETS, traffic

DATA = RESULTS / "compiled.json"
# Bytes per second and direction of a GPU's or chip's links to the others, by data sheet: NVLink 4, ICI.
LINKS = {"h100": 450e9, "v5e": 200e9, "v5p": 600e9, "v6e": 400e9}
CHIPS = (8, 64, 1024)
BATCHES = (32, 64, 128, 256, 512)
PAGE = """\
# Programs compiled for GPUs and TPUs

`make accelerators`. Calculated from programs that XLA compiled without a device; nothing was run. A training step in bfloat16 at
224 px; the images are those of one device. Bytes are sums over kernels for GPUs and XLA's own count for TPUs, on-chip memory
included; of an operand that a GPU's kernel only slices, the slices count. `benchmarks/floor.py` counts the least by shapes. The
lower limit of a step is the larger of bytes / bandwidth and FLOP / peak.

{networks}

![Roofline](compiled.png)

## Collectives by number of devices

`make accelerators ARGS=--scale`, with networks cut to two blocks. Gradients, statistics and metrics are reduced together.

{scale}

## Expected efficiency, calculated

efficiency = t / (t + 2 (n - 1) / n · b / l) with t the lower limit of a step, n devices, b the bytes of gradients and statistics
and l the bandwidth of a device's links by data sheet. Reduction and computation do not overlap in this formula, and slower links
between hosts are left out.

{efficiency}

## Memory by batch size, calculated

GB of one device for other batches, from the one batch that each network above was compiled for:

    memory(b) = s + g + b (i + (T - g) / B)

with B the images of the compiled program, T its temporaries, s the training state (parameters, momentum and statistics: its
arguments without the images), g the gradients (as large as the parameters, in float32) and i the bytes of an image. The
activations grow with the batch; state and gradients do not. XLA plans every batch anew, so a compiled program may need more or
less.

{memory}
"""


def add(found: dict[str, Any]) -> None:
    """Add a program to the record, in place of an earlier one of the same name, and write all three files."""
    entries: list[dict[str, Any]] = json.loads(DATA.read_text())["programs"] if DATA.exists() else []
    found = {**found, "date": datetime.date.today().isoformat()}
    entries = [entry for entry in entries if name_of(entry) != name_of(found)] + [found]
    order = list(TARGETS)
    entries.sort(key=lambda entry: (entry["short"], order.index(entry["target"])))
    DATA.write_text(json.dumps({"programs": entries}, indent=1) + "\n")
    (RESULTS / "compiled.md").write_text(page(entries))
    draw([entry for entry in entries if "error" not in entry and not entry["short"]], RESULTS / "compiled.png")


def name_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a program."""
    return tuple(entry[key] for key in ("target", "network", "mode", "dtype", "size", "batch", "short", "topology"))


def page(entries: list[dict[str, Any]]) -> str:
    """Return the report as Markdown."""
    whole = [entry for entry in entries if not entry["short"]]
    plain = {entry["target"]: traffic(entry) for entry in whole if entry["network"] == PLAIN and "error" not in entry}
    rows = [
        "| target | network | kernels | GB read and written | least by shapes, GB | ÷ plain ResNet-50 | temporaries, GB "
        "| copies and transposes, GB | collectives | lower limit of a step, ms | jax, date |",
        "|" + " --- |" * 11,
    ]
    for entry in whole:
        if "error" in entry:
            rows.append(f"| {entry['target']} | {entry['network']} | {entry['error']} |" + " |" * 8)
            continue
        target, moved = TARGETS[entry["target"]], traffic(entry)
        against = f"{moved / plain[entry['target']]:.2f}" if entry["target"] in plain else "–"
        cells = [
            f"{entry['target']}, {target.batch} images",
            entry["network"],
            entry["kernels"],
            f"{moved / 1e9:.1f}",
            f"{least / 1e9:.1f}" if (least := entry.get("least_bytes")) else "–",
            against,
            f"{entry['temporaries'] / 1e9:.2f}",
            f"{entry['moved_bytes'] / 1e9:.1f}",
            entry["collectives"]["count"],
            f"{lower_limit(entry) * 1e3:.0f}",
            f"{entry['jax']}, {entry['date']}",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    scale = [
        "| target | devices | network | all-reduces | MB reduced | temporaries per device, MB |",
        "|" + " --- |" * 6,
        *(
            f"| {entry['target']} | {entry['topology']} | {entry['network']}, two blocks | {entry['collectives']['count']} "
            f"| {entry['collectives']['bytes'] / 1e6:.1f} | {entry['temporaries'] / 1e6:.0f} |"
            for entry in entries
            if entry["short"] and "error" not in entry
        ),
    ]
    parts = {"networks": rows, "scale": scale, "efficiency": efficiency(whole), "memory": memory(whole)}
    return PAGE.format(**{name: "\n".join(lines) for name, lines in parts.items()})


def efficiency(whole: list[dict[str, Any]]) -> list[str]:
    """Return the rows of the table of efficiencies."""
    rows = [
        "| target | network | " + " | ".join(f"{count} devices" for count in CHIPS) + " | batch per device for 95 % at 1,024 |"
    ]
    rows.append("|" + " --- |" * (len(CHIPS) + 3))
    for entry in whole:
        if "error" in entry or entry["target"] not in LINKS or entry["network"] == PLAIN:
            continue
        limit, link = lower_limit(entry), LINKS[entry["target"]]
        reduced = entry["reduced_bytes"]
        spent = {count: 2 * (count - 1) / count * reduced / link for count in CHIPS}
        images = TARGETS[entry["target"]].batch
        needed = 19 * spent[CHIPS[-1]] / (limit / images)
        shares = " | ".join(f"{limit / (limit + spent[count]):.1%}" for count in CHIPS)
        rows.append(f"| {entry['target']} | {entry['network']} | {shares} | {needed:.0f} |")
    return rows


def memory(whole: list[dict[str, Any]]) -> list[str]:
    """Return the rows of the table of memory by batch size."""
    rows = ["| target | network | " + " | ".join(f"{batch} images" for batch in BATCHES) + " | images that fit |"]
    rows.append("|" + " --- |" * (len(BATCHES) + 3))
    for entry in whole:
        if "error" not in entry:
            fixed, per_image = memory_parts(entry)
            size = TARGETS[entry["target"]].memory
            needs = [fixed + batch * per_image for batch in BATCHES]
            cells = [f"{need / 1e9:.1f}" if need <= size else "–" for need in needs]
            fits = f"about {int((size - fixed) / per_image) // 10 * 10:,} in {size / 1e9:.0f} GB"
            rows.append(f"| {entry['target']} | {entry['network']} | {' | '.join(cells)} | {fits} |")
    return rows


def memory_parts(entry: dict[str, Any]) -> tuple[float, float]:
    """Return the bytes of a training step that do not depend on the batch, and those for each of its images."""
    images = entry["batch"] or TARGETS[entry["target"]].batch
    image = entry["size"] ** 2 * 3 + 4  # uint8 pixels and a label of four bytes
    state = entry["arguments"] - images * image
    gradients = state - entry["reduced_bytes"]  # as many as the momentum, which is the state without parameters and statistics
    return state + gradients, image + (entry["temporaries"] - gradients) / images


def lower_limit(entry: dict[str, Any]) -> float:
    """Return the least seconds of a step: its bytes at full bandwidth, or its arithmetic at the peak."""
    target = TARGETS[entry["target"]]
    return max(traffic(entry) / target.bandwidth, entry["model_flops"] / target.peak)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw the roofline of each target and the programs below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = [10 ** (x / 20) for x in range(0, 71)]
    markers = dict(zip(sorted({entry["network"] for entry in entries}), "osD^vP", strict=False))
    for number, (name, target) in enumerate(TARGETS.items()):
        color = f"C{number}"
        axes.plot(
            intensities, [min(x * target.bandwidth, target.peak) / 1e12 for x in intensities], color=color, label=target.name
        )
        for entry in entries:
            if entry["target"] == name:
                intensity = entry["model_flops"] / traffic(entry)
                height = min(intensity * target.bandwidth, target.peak) / 1e12
                axes.plot(intensity, height, markers[entry["network"]], color=color, markersize=8, markeredgecolor="white")
    for network, marker in markers.items():
        axes.plot([], [], marker, color="grey", label=network)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic", ylabel="TFLOP/s attainable")
    axes.set_title("Training steps in bfloat16 below the roofline (calculated)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
