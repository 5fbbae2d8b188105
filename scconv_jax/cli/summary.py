"""The command `summary`: the size of a network, part by part, and both papers' tables beside ours."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from scconv_jax.cli.console import show
from scconv_jax.models.complexity import Part, summarise
from scconv_jax.models.published import ROWS
from scconv_jax.models.registry import create_model, list_models


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    summary = commands.add_parser(
        "summary",
        help="parameters and multiply-adds of a network by part, or of all networks beside the papers'",
        description="Count parameters and multiply-adds from shapes; nothing is computed or allocated.",
    )
    summary.add_argument("model", nargs="?", metavar="MODEL", help="name of the network; without one, the names are listed")
    summary.add_argument("--all", action="store_true", help="both papers' tables with our figures beside them")
    summary.add_argument(
        "--size", type=int, metavar="PX", help="height and width of the images (default: 224, small networks 32)"
    )
    summary.add_argument("--depth", type=int, default=2, metavar="N", help="1: stages, 2: their blocks, 3: ... (default: 2)")
    summary.add_argument("--num-classes", type=int, metavar="N", help="length of the logits (default: the network's)")
    summary.add_argument("--output-stride", type=int, metavar="N", help="32, 16 or 8 (default: the network's)")
    summary.add_argument("--json", action="store_true", help="print JSON, not a table")
    summary.set_defaults(run=_summary)


def _summary(options: argparse.Namespace) -> None:
    if options.all:
        given = [name for name in ("model", "size", "num_classes", "output_stride") if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--all shows both papers' tables as they stand; leave it out, or {_flag(given[0])}.")
        _papers(options)
    elif options.model is None:
        print(json.dumps(list_models(), indent=1) if options.json else "\n".join(list_models()))
    else:
        _network(options)


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _network(options: argparse.Namespace) -> None:
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size {options.size} must be 1 or more: height and width of the images in pixels.")
    if options.depth < 1:
        raise ValueError(f"--depth {options.depth} must be 1 or more: 1 gives a network's stages, 2 their blocks.")
    given = {"num_classes": options.num_classes, "output_stride": options.output_stride}
    model = create_model(options.model, **{name: value for name, value in given.items() if value is not None})
    size = options.size or (32 if options.model.endswith("_small") else 224)
    parts = summarise(model, (size, size), options.depth)
    parameters, multiply_adds = (sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts))
    total = Part("total", "", parts[-1].output, parameters, multiply_adds)
    if options.json:
        print(json.dumps({"model": options.model, "size": size, "parts": [part._asdict() for part in (*parts, total)]}, indent=1))
        return
    table = Table(title=f"{options.model}, {size}×{size} px")
    table.add_column("part")
    table.add_column("kind")
    for heading in ("output", "parameters", "share", "multiply-adds", "share"):
        table.add_column(heading, justify="right")
    for part in (*parts, total):
        table.add_row(
            part.name,
            part.kind,
            "×".join(map(str, part.output[1:])),
            f"{part.parameters:,}",
            f"{part.parameters / total.parameters:.1%}",
            f"{part.multiply_adds:,}",
            f"{part.multiply_adds / total.multiply_adds:.1%}",
            end_section=part is parts[-1],
        )
    show(table)


def _papers(options: argparse.Namespace) -> None:
    records = []
    for row in ROWS:
        total = summarise(create_model(row.model, **row.options), (row.size, row.size), depth=1)
        parameters = sum(part.parameters for part in total) / 1e6
        multiply_adds = sum(part.multiply_adds for part in total) / 1e9
        records.append(
            {
                "paper": row.paper,
                "network": row.label,
                "model": row.model,
                "size": row.size,
                "parameters_paper": row.parameters,
                "parameters": parameters,
                "parameters_percent": _percent(parameters, row.parameters),
                "multiply_adds_paper": row.multiply_adds,
                "multiply_adds": multiply_adds,
                "multiply_adds_percent": _percent(multiply_adds, row.multiply_adds),
                "margins_percent": row.margins,
                "note": row.reason,
            }
        )
    if options.json:
        print(json.dumps(records, indent=1))
        return
    titles = {2020: "SC-Conv (Liu et al., CVPR 2020)", 2023: "ScConv (Li et al., CVPR 2023)"}
    for year, title in titles.items():
        table = Table(title=title, caption="parameters in millions, multiply-adds in billions; ours counted at the paper's size")
        for heading in ("network", "model"):
            table.add_column(heading, no_wrap=True)
        for heading in ("px", "params, paper", "ours", "%", "m-adds, paper", "ours", "%", "within %"):
            table.add_column(heading, justify="right")
        table.add_column("note")
        for record in (record for record in records if record["paper"] == year):
            table.add_row(
                record["network"],
                record["model"],
                str(record["size"]),
                f"{record['parameters_paper']:.2f}",
                f"{record['parameters']:.2f}",
                f"{record['parameters_percent']:+.1f}",
                f"{record['multiply_adds_paper']:.3g}",
                f"{record['multiply_adds']:.3g}",
                f"{record['multiply_adds_percent']:+.1f}",
                " / ".join(f"{margin:g}" for margin in record["margins_percent"]),
                record["note"],
            )
        show(table)


def _percent(ours: float, paper: float) -> float:
    return round(100 * (ours / paper - 1), 2)
