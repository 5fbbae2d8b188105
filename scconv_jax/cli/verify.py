"""The command `verify`: compares a converted network with PyTorch, stage by stage."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.table import Table
from rich.text import Text

from scconv_jax.cli.console import show
from scconv_jax.cli.convert import ANY, add_source, model_options, open_source
from scconv_jax.interop.conversion import ConversionError
from scconv_jax.interop.loading import build_model
from scconv_jax.interop.verification import LIMITS, SIZES, Difference, compare
from scconv_jax.models.registry import model_info


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "verify",
        help="prove on this machine that converted weights compute what PyTorch computes",
        description="Convert weights, run the network in JAX and in PyTorch on the same images, and print the largest difference "
        "at each stage, relative to the largest value there. Exit code: 0 within tolerance, 1 above it, 2 for bad input.",
    )
    add_source(parser)
    parser.add_argument(
        "--reference",
        metavar="FILE.py:NAME",
        help="compare with the PyTorch network in a file, e.g. scnet.py:scnet50; the file is run (default: the network is "
        "rebuilt with PyTorch's operators from the source's entries)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help=f"largest accepted difference in float32 (default: {LIMITS['float32']:g}); float64 always has {LIMITS['float64']:g}",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="PX",
        help="sizes of the images: 224, or 193x161 for height x width (default: 224x224 256x256 193x161; for small networks "
        "32x32 40x40 33x27)",
    )
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    if options.tolerance is not None and not options.tolerance > 0:
        raise ConversionError(f"--tolerance {options.tolerance:g}: expected a number above 0.")
    limits = LIMITS | ({"float32": options.tolerance} if options.tolerance is not None else {})
    sizes = [_parse_size(text) for text in options.sizes or ()]
    if options.model == ANY:
        raise ConversionError(f"verify needs a network to run; --model {ANY} names none.")
    started = time.perf_counter()
    checkpoint = open_source(options)
    loaded = build_model(checkpoint, options.model, model_options(options))
    sizes = sizes or SIZES[model_info(loaded.name).image_size]
    largest: dict[tuple[str, str], Difference] = {}
    for difference in compare(checkpoint, loaded, reference=options.reference, sizes=sizes):
        key = difference.stage, difference.dtype
        if key not in largest or difference.value > largest[key].value:
            largest[key] = difference
    judged = ["float64"] if any(".SRU." in f".{key}" for key in checkpoint.arrays) else list(limits)
    title = f"{checkpoint.source.path.name} as {loaded.name}: JAX and {options.reference or 'PyTorch'}"
    show(_table(title, largest, limits, judged))
    for note in loaded.notes:
        print(f"note: {note}")
    if "float32" not in judged:
        print(
            "note: ScConv's gate is a step. If a weight is within rounding error of the threshold, float32 may fall on opposite "
            "sides here and in PyTorch, which shows as a large difference in one pixel: only float64 decides."
        )
    wrong = [value for value in largest.values() if value.dtype in judged and not value.value <= limits[value.dtype]]
    seconds = f"{time.perf_counter() - started:.0f} s"
    if wrong:
        print(f"Not equal: {wrong[0].stage} differs by {wrong[0].value:.1e} in {wrong[0].dtype} ({seconds}).")
        return 1
    print(f"Equal within tolerance at every stage ({seconds}).")
    return 0


def _table(title: str, largest: dict[tuple[str, str], Difference], limits: dict[str, float], judged: list[str]) -> Table:
    table = Table(title=title)
    table.add_column("stage")
    for dtype, limit in limits.items():
        table.add_column(f"{dtype} (limit {limit:.0e})" if dtype in judged else f"{dtype} (not judged)", justify="right")
        table.add_column("largest on")
    for stage in dict.fromkeys(stage for stage, _ in largest):
        cells: list[Text] = []
        for dtype, limit in limits.items():
            value = largest[stage, dtype]
            failed = dtype in judged and not value.value <= limit
            cells += [
                Text(f"{value.value:.1e}", style="bold red" if failed else ""),
                Text(f"{value.images}, {value.size[0]}×{value.size[1]}"),
            ]
        table.add_row(stage, *cells)
    return table


def _parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConversionError(f"--sizes {text}: expected pixels, 224 or 193x161.")
    return int(parts[0]), int(parts[-1])
