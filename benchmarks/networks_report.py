"""Writes the record of `benchmarks.networks`: JSON, Markdown, a picture, and the table in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS, environment, table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks.networks -->", "<!-- end of benchmarks.networks -->"
COLUMNS = {
    "eager": "PyTorch eager, ms",
    "compiled": "torch.compile, ms",
    "jax": "scconv_jax, ms",
    "fused": "fused, ms",
}


def write(record: dict[str, Any]) -> None:
    """Write `networks.json`, `networks.md` and `networks.png`, and print the Markdown."""
    record = {"environment": environment()} | record
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "networks.json").write_text(json.dumps(record, indent=1) + "\n")
    page = (
        f"# Networks against PyTorch\n\n`{record['command']}`. {record['environment']}; "
        f"{record['minutes']} minutes.\n\n"
        f"{explanation(record)}\n\n{speed_table(record['speed'])}\n\n{twins(record['speed'])}\n\n"
        f"![time relative to PyTorch](networks.png)\n\n{start_table(record['start'])}\n"
    )
    print(page)
    (RESULTS / "networks.md").write_text(page)
    draw(record["speed"], RESULTS / "networks.png")


def explanation(record: dict[str, Any]) -> str:
    """Return how the figures were measured, as text."""
    return (
        f"Networks at {record['size']} px, operators on 256 channels of 14 px; float32; alternating in one process. Median times "
        "and, in brackets, medians of the ratios to PyTorch's eager time in the same round. PyTorch is in channels_last; "
        "inference in JAX uses `inference_options()`; a step is forward, backward and SGD with momentum. `torch.compile` had "
        "its turns with eager PyTorch alone, because the other kinds are slower in turn with it."
    )


def speed_table(speed: list[dict[str, Any]]) -> str:
    """Return the times and ratios as a Markdown table."""
    kinds = [kind for kind in COLUMNS if any(kind in row for row in speed)]
    rows = []
    for row in speed:
        cells = []
        for kind in kinds:
            found = row.get(kind)
            ratio = f" ({found['ratio'][0]:.2f})" if found and kind != "eager" else ""
            cells.append(f"{found['ms']:.1f}{ratio}" if found else "")
        rows.append([row["name"], str(row["batch"]), row["work"], *cells])
    return table(["network", "batch", "work", *(COLUMNS[kind] for kind in kinds)], rows)


def twins(speed: list[dict[str, Any]]) -> str:
    """Return SCNet-50's time relative to that of this project's ResNet-50, as text; "" if one was not measured."""
    times = {(row["name"], row["work"]): row["jax"]["ms"] for row in speed if row["batch"] == 8}
    pairs = [("scnet50", "inference"), ("scnet50", "step"), ("scconv_resnet50", "inference"), ("scconv_resnet50", "step")]
    parts = [
        f"{name}, {work}: {times[name, work] / times['resnet50', work]:.2f}"
        for name, work in pairs
        if (name, work) in times and ("resnet50", work) in times
    ]
    return f"Relative to resnet50 of this project, batch 8: {'; '.join(parts)}." if parts else ""


def start_table(start: list[dict[str, Any]]) -> str:
    """Return times to the first result and peak memory under a heading, as a Markdown table."""
    if not start:
        return "Start and memory were not measured."
    kinds = [kind for kind in COLUMNS if any(row["kind"] == kind for row in start)]
    found = {(row["name"], row["work"], row["kind"]): f"{row['first_s']:.1f} s, {row['peak_mb']:,} MB" for row in start}
    places = dict.fromkeys((row["name"], row["work"]) for row in start)
    rows = [[*place, *(found.get((*place, kind), "") for kind in kinds)] for place in places]
    return (
        "## Start and memory\n\nBatch 8. Seconds from building the network to its first result, compilation included, with empty "
        "caches; peak memory of later calls, above that of the imports.\n\n"
        + table(["network", "work", *(COLUMNS[kind].removesuffix(", ms") for kind in kinds)], rows)
    )


def draw(speed: list[dict[str, Any]], path: Path) -> None:
    """Draw the times at batch 8, relative to PyTorch's eager times."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    colours = {"eager": "#b0b0b0", "compiled": "#7f7f7f", "jax": "#1f77b4", "fused": "#0b3d66"}
    for axis, work in zip(axes, ("inference", "step"), strict=True):
        rows = [row for row in speed if row["batch"] == 8 and row["work"] == work]
        kinds = [kind for kind in COLUMNS if any(kind in row for row in rows)]
        width = 0.8 / max(len(kinds), 1)
        for i, kind in enumerate(kinds):
            places = [x for x, row in enumerate(rows) if kind in row]
            heights = [rows[x][kind]["ratio"][0] for x in places]
            bars = axis.bar([x + i * width for x in places], heights, width, color=colours[kind])
            bars.set_label(COLUMNS[kind].removesuffix(", ms"))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], [row["name"] for row in rows], rotation=20, ha="right")
        axis.set_title("inference" if work == "inference" else "training step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time / PyTorch eager")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def quote() -> None:
    """Write the recorded figures of batch 8 between the markers in the README."""
    record = json.loads((RESULTS / "networks.json").read_text())
    rows = [row for row in record["speed"] if row["batch"] == 8]
    source = f"`{record['command']}`; {record['environment']}"
    text = f"{explanation(record)} {source}.\n\n{speed_table(rows)}\n\n{twins(record['speed'])}"
    page = README.read_text()
    new = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)
    if BEGIN not in page:
        raise SystemExit(f"{README} has no {BEGIN}")
    README.write_text(new)


if __name__ == "__main__":
    quote()
