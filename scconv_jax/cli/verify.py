"""The command `verify`: a converted network beside PyTorch's, stage by stage."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.table import Table
from rich.text import Text

from scconv_jax.cli.console import show
from scconv_jax.cli.convert import ANY, add_source, model_options, open_source
from scconv_jax.interop.conversion import ConversionError
from scconv_jax.interop.loading import choose, fill_model
from scconv_jax.interop.verification import LIMITS, SIZES, SMALL_SIZES, Difference, compare
from scconv_jax.models.registry import create_model


def add(commands: Any) -> None:
    """Add the command to the parser's."""
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
        help="compare with a network of your own code, scnet.py:scnet50 say; the file is run (default: PyTorch's operators on "
        "the source's own entries)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help=f"in float32 (default: {LIMITS['float32']:g}); float64 has {LIMITS['float64']:g}",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="PX",
        help="of images: 224, or 193x161 for height x width (default: 224x224 256x256 193x161; of small networks "
        "32x32 40x40 33x27)",
    )
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    if options.tolerance is not None and not options.tolerance > 0:
        raise ConversionError(f"--tolerance {options.tolerance:g}: expected a number above 0.")
    limits = LIMITS | ({"float32": options.tolerance} if options.tolerance is not None else {})
    sizes = [_size(text) for text in options.sizes or ()]
    if options.model == ANY:
        raise ConversionError(f"verify runs a network; --model {ANY} is none.")
    started = time.perf_counter()
    found = open_source(options)
    name, arguments = choose(found, options.model, model_options(options))
    sizes = sizes or (SMALL_SIZES if name.endswith("_small") else SIZES)
    filled = fill_model(found, name, create_model(name, **arguments))
    largest: dict[tuple[str, str], Difference] = {}
    without = ["logits"] if filled.match.unfilled else []
    for difference in compare(
        found, name, arguments, filled.variables, reference=options.reference, sizes=sizes, without=without
    ):
        key = difference.stage, difference.dtype
        if key not in largest or difference.value > largest[key].value:
            largest[key] = difference
    judged = ["float64"] if any(".SRU." in f".{entry}" for entry in found.arrays) else list(limits)
    table = Table(title=f"{found.source.path.name} as {name}: JAX beside {options.reference or 'PyTorch'}")
    table.add_column("stage")
    for dtype, limit in limits.items():
        table.add_column(f"{dtype} (limit {limit:.0e})" if dtype in judged else f"{dtype} (not judged)", justify="right")
        table.add_column("largest on")
    for stage in dict.fromkeys(stage for stage, _ in largest):
        cells: list[Text] = []
        for dtype, limit in limits.items():
            value = largest[stage, dtype]
            cells += [
                Text(f"{value.value:.1e}", style="bold red" if dtype in judged and not value.value <= limit else ""),
                Text(f"{value.images}, {value.size[0]}×{value.size[1]}"),
            ]
        table.add_row(stage, *cells)
    show(table)
    for note in filled.notes:
        print(f"note: {note}")
    if found.opinion.text:
        print(f"note: PyTorch's own loader, of the file: {found.opinion.text}.")
    if "float32" not in judged:
        print(
            "note: ScConv's gate is a step. Where a weight is within rounding of the threshold, float32 may fall on the other "
            "side here than in PyTorch, which shows as one pixel's large difference: float64 alone decides."
        )
    wrong = [value for value in largest.values() if value.dtype in judged and not value.value <= limits[value.dtype]]
    seconds = f"{time.perf_counter() - started:.0f} s"
    if not wrong:
        print(f"Equal within tolerance at every stage ({seconds}).")
        return 0
    first = wrong[0]
    print(f"Not equal: {first.stage} differs by {first.value:.1e} in {first.dtype} ({seconds}).")
    return 1


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConversionError(f"--sizes {text}: expected pixels, 224 or 193x161.")
    return int(parts[0]), int(parts[-1])
