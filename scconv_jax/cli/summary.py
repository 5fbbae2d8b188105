"""The command `summary`: the size of a network part by part, the papers' tables, and the page of all networks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table

from scconv_jax.cli.console import show
from scconv_jax.models.complexity import summarise, total
from scconv_jax.models.registry import MODELS, create_model, list_models, model_info
from scconv_jax.models.spec import COMMON, ModelSpec, Row

PAPERS = {2020: "SC-Conv (Liu et al., CVPR 2020)", 2023: "ScConv (Li et al., CVPR 2023)"}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = commands.add_parser(
        "summary",
        help="parameters and multiply-adds of a network by part, or of all networks with the papers' figures",
        description="Count parameters and multiply-adds from shapes, without computing or allocating anything.",
    )
    summary.add_argument("model", nargs="?", metavar="MODEL", help="name of the network (default: list all names)")
    summary.add_argument("--all", action="store_true", help="show the tables of both papers with our counts")
    summary.add_argument("--markdown", action="store_true", help="print docs/networks.md, the page of all networks")
    summary.add_argument("--size", type=int, metavar="PX", help="height and width of the images (default: the network's)")
    summary.add_argument("--depth", type=int, default=2, metavar="N", help="1: stages, 2: their blocks, 3: ... (default: 2)")
    summary.add_argument("--num-classes", type=int, metavar="N", help="length of the logits (default: the network's)")
    summary.add_argument("--output-stride", type=int, metavar="N", help="32, 16 or 8 (default: the network's)")
    summary.add_argument("--json", action="store_true", help="print JSON instead of a table")
    summary.set_defaults(run=_summary)


def _summary(options: argparse.Namespace) -> None:
    for whole in ("all", "markdown"):
        given = [name for name in ("model", "size", "num_classes", "output_stride") if getattr(options, name) is not None]
        given += ["json"] if options.json and whole == "markdown" else []
        if getattr(options, whole) and given:
            raise ValueError(f"--{whole} shows all networks as they are and cannot be combined with {_flag(given[0])}.")
    if options.markdown:
        print("\n".join(_page()))
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
    model = create_model(options.model, **{name: value for name, value in given.items() if value is not None})
    size = options.size or model_info(options.model).image_size
    parts = summarise(model, (size, size), options.depth)
    whole = total(parts)
    if options.json:
        print(json.dumps({"model": options.model, "size": size, "parts": [part._asdict() for part in (*parts, whole)]}, indent=1))
        return
    table = Table(title=f"{options.model}, {size}×{size} px")
    table.add_column("part")
    table.add_column("kind")
    for heading in ("output", "parameters", "share", "multiply-adds", "share"):
        table.add_column(heading, justify="right")
    for part in (*parts, whole):
        table.add_row(
            part.name,
            part.kind,
            "×".join(map(str, part.output[1:])),
            f"{part.parameters:,}",
            f"{part.parameters / whole.parameters:.1%}",
            f"{part.multiply_adds:,}",
            f"{part.multiply_adds / whole.multiply_adds:.1%}",
            end_section=part is parts[-1],
        )
    show(table)


def _rows() -> list[tuple[ModelSpec, Row]]:
    """Return the rows of the papers' tables, each network without ScConv before the same network with it."""
    groups: dict[tuple[int, int, str], list[tuple[ModelSpec, Row]]] = {}
    for spec in MODELS.values():
        for row in spec.rows:
            groups.setdefault((row.paper, spec.image_size, row.label.partition(",")[0]), []).append((spec, row))
    return [row for key in sorted(groups, key=lambda key: (key[0], -key[1])) for row in groups[key]]


def _records() -> Iterator[dict[str, Any]]:
    """Yield each row of the papers' tables with our counts, in millions and billions."""
    for spec, row in _rows():
        whole = total(summarise(create_model(spec.name, **row.options), depth=1))
        parameters, multiply_adds = whole.parameters / 1e6, whole.multiply_adds / 1e9
        yield {
            "paper": row.paper,
            "network": row.label,
            "model": spec.name,
            "size": spec.image_size,
            "parameters_paper": row.parameters,
            "parameters": parameters,
            "parameters_percent": _percent(parameters, row.parameters),
            "multiply_adds_paper": row.multiply_adds,
            "multiply_adds": multiply_adds,
            "multiply_adds_percent": _percent(multiply_adds, row.multiply_adds),
            "margins_percent": row.margins,
            "top1_paper": row.top1,
            "note": row.reason,
        }


def _percent(ours: float, paper: float) -> float:
    return round(100 * (ours / paper - 1), 2)


def _cells(record: dict[str, Any]) -> dict[str, str]:
    """Return one row of a paper's table by heading."""
    return {
        "network": record["network"],
        "model": record["model"],
        "px": str(record["size"]),
        "params, paper": f"{record['parameters_paper']:.2f}",
        "params, ours": f"{record['parameters']:.2f}",
        "params, %": f"{record['parameters_percent']:+.1f}",
        "m-adds, paper": f"{record['multiply_adds_paper']:.3g}",
        "m-adds, ours": f"{record['multiply_adds']:.3g}",
        "m-adds, %": f"{record['multiply_adds_percent']:+.1f}",
        "within %": " / ".join(f"{margin:g}" for margin in record["margins_percent"]),
        "top-1, paper": f"{record['top1_paper']:.2f}",
        "note": record["note"],
    }


def _papers(options: argparse.Namespace) -> None:
    records = list(_records())
    if options.json:
        print(json.dumps(records, indent=1))
        return
    for year, title in PAPERS.items():
        table = Table(title=title, caption="parameters in millions, multiply-adds in billions, counted at the paper's size")
        rows = [_cells(record) for record in records if record["paper"] == year]
        for heading in rows[0]:
            names = heading in ("network", "model")
            table.add_column(heading, no_wrap=names, justify="left" if names or heading == "note" else "right")
        for row in rows:
            table.add_row(*row.values())
        show(table)


def _page() -> Iterator[str]:
    """Yield the lines of docs/networks.md."""
    yield "# Networks\n"
    yield "<!-- Do not edit: `python -m scconv_jax summary --markdown > docs/networks.md` writes this page. -->\n"
    yield (
        "`scconv_jax.create_model(NAME)` returns a network, `scconv_jax.model_info(NAME)` its record, from which this page is\n"
        "made, and `scconv_jax.feature_info(NAME)` the channels and strides of its maps.\n"
        '`scconv_jax.list_models("scnet*", pretrained=True)` lists the names that match a pattern and have published weights.\n'
    )
    for size, title in ((224, "For ImageNet"), (32, "For small images")):
        specs = [spec for spec in MODELS.values() if spec.image_size == size]
        images = specs[0].preparation
        yield f"## {title}\n"
        yield (
            f"Test images: resize the shorter side to {images.resize} px, crop the central {images.size}×{images.size} px,\n"
            f"subtract the mean {images.mean} and divide by the standard deviation {images.std}.\n"
        )
        yield from _table(
            {
                "network": f"`{spec.name}`",
                "parameters": f"{spec.parameters:,}",
                "multiply-adds": f"{spec.multiply_adds / 1e9:.3g} G",
                "smallest image": f"{spec.smallest_image} px",
                "channels / stride of each map": ", ".join(f"{channels}/{stride}" for channels, stride in spec.features.values()),
                "key conventions": ", ".join(spec.conventions) or "its own",
                "options": ", ".join(f"`{option}`" for option in spec.options if option not in COMMON) or "–",
            }
            for spec in specs
        )
    yield "All networks have the options of the first three rows:\n"
    meanings = {option: meaning for spec in MODELS.values() for option, meaning in spec.options.items()}
    yield from _table({"option": f"`{option}`", "meaning": meaning} for option, meaning in meanings.items())
    yield "## Published weights\n"
    yield "`scconv_jax.load_model(NAME)` downloads them and checks their SHA-256.\n"
    published = [spec for spec in MODELS.values() if spec.weights]
    yield from _table(
        {"network": f"`{spec.name}`", "SHA-256": f"{spec.sha256}…", "address": f"<{spec.weights}>"} for spec in published
    )
    yield "## The papers' tables\n"
    yield (
        "Parameters in millions and multiply-adds in billions, the paper's and ours. Multiply-adds follow the papers:\n"
        "convolutions, linear layers and the scales of norms; additions, activations, pooling and gates are excluded.\n"
        "Top-1 accuracy is the paper's, in percent: on ImageNet at 224 px, on CIFAR-100 at 32 px.\n"
    )
    records = list(_records())
    for year, title in PAPERS.items():
        yield f"### {title}\n"
        yield from _table(_cells(record) for record in records if record["paper"] == year)


def _table(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """Yield a table in Markdown, given the cells of each row by heading."""
    rows = list(rows)
    for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        yield f"| {' | '.join(cells)} |"
    yield ""
