"""The command `summary`: the size of a network part by part, the papers' tables, and the page of all networks."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.table import Table

from scconv_jax.cli.console import show
from scconv_jax.models.registry import list_models
from scconv_jax.reports import HEADINGS, PAPERS, networks_page, paper_cells, paper_records, summary


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "summary",
        help="parameters and multiply-adds of a network by part, or of all networks with the papers' figures",
        description="Count parameters and multiply-adds from shapes, without computing or allocating anything.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name of the network (default: list all names)")
    parser.add_argument("--all", action="store_true", help="show the tables of both papers with our counts")
    parser.add_argument("--markdown", action="store_true", help="print docs/networks.md, the page of all networks")
    parser.add_argument("--size", type=int, metavar="PX", help="height and width of the images (default: the network's)")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="1: stages, 2: their blocks, 3: ... (default: 2)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="length of the logits, 0: no head (default: the network's)")
    parser.add_argument("--output-stride", type=int, metavar="N", help="32, 16 or 8 (default: the network's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_summary)


def _summary(options: argparse.Namespace) -> None:
    for whole in ("all", "markdown"):
        given = [name for name in ("model", "size", "num_classes", "output_stride") if getattr(options, name) is not None]
        given += ["json"] if options.json and whole == "markdown" else []
        if getattr(options, whole) and given:
            raise ValueError(f"--{whole} shows all networks as they are and cannot be combined with {_flag(given[0])}.")
    if options.markdown:
        print("\n".join(networks_page()))
    elif options.all:
        _papers(options)
    elif options.model is None:
        print(json.dumps(list_models(), indent=1) if options.json else "\n".join(list_models()))
    else:
        _network(options)


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _network(options: argparse.Namespace) -> None:
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size {options.size} must be 1 or more: it is the height and width of the images in pixels.")
    if options.depth < 1:
        raise ValueError(f"--depth {options.depth} must be 1 or more: 1 lists a network's stages, 2 their blocks.")
    given = {"num_classes": options.num_classes, "output_stride": options.output_stride}
    found = summary(
        options.model, options.size, depth=options.depth, **{name: value for name, value in given.items() if value is not None}
    )
    if options.json:
        parts = [part._asdict() for part in (*found.parts, found.total)]
        print(json.dumps({"model": options.model, "size": found.size[0], "parts": parts}, indent=1))
        return
    table = Table(title=found.title)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right")
    *parts, whole = found.rows()
    for part in parts:
        table.add_row(*part, end_section=part is parts[-1])
    table.add_row(*whole)
    show(table)


def _papers(options: argparse.Namespace) -> None:
    records = list(paper_records())
    if options.json:
        print(json.dumps(records, indent=1))
        return
    for year, title in PAPERS.items():
        table = Table(title=title, caption="parameters in millions, multiply-adds in billions, counted at the paper's size")
        rows = [paper_cells(record) for record in records if record["paper"] == year]
        for heading in rows[0]:
            names = heading in ("network", "model")
            table.add_column(heading, no_wrap=names, justify="left" if names or heading == "note" else "right")
        for row in rows:
            table.add_row(*row.values())
        show(table)
