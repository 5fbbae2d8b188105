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
from scconv_jax.interop.loading import build_model, convert_checkpoint
from scconv_jax.interop.references import FlaxNetwork
from scconv_jax.interop.verification import LIMITS, SIZES, Difference, compare
from scconv_jax.models.registry import model_info
from scconv_jax.programs import keep_programs


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "verify",
        help="prove on this machine that converted weights compute what PyTorch computes",
        description="Convert weights, run the network in JAX and in PyTorch on the same images, and print the largest difference "
        "at each stage, relative to the largest value there. Exit code: 0 within tolerance, 1 above it, 2 for bad input, 3 if "
        "rounding, which some networks amplify, could hide any difference.",
    )
    add_source(parser)
    parser.add_argument(
        "--reference",
        metavar="FILE.py:NAME",
        help="compare with the PyTorch network in a file, e.g. scnet.py:scnet50; the file is run (default: the network is "
        "rebuilt with PyTorch's operators from the source's entries)",
    )
    parser.add_argument(
        "--flax",
        metavar="FILE.py:NAME",
        help="verify a network of your own, a Flax module in a file, with --reference for its PyTorch counterpart; both files "
        "are run, and modules of the same name are compared (--rename maps PyTorch's names to Flax's)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help=f"largest accepted difference in float32 (default: {LIMITS['float32']:g}, more if the network amplifies rounding); "
        f"in float64 it is {LIMITS['float64']:g}, or more for such a network",
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
    keep_programs()
    if options.tolerance is not None and not options.tolerance > 0:
        raise ConversionError(f"--tolerance {options.tolerance:g}: expected a number above 0.")
    sizes = [_parse_size(text) for text in options.sizes or ()]
    if options.model == ANY:
        raise ConversionError(f"verify needs a network to run; --model {ANY} names none.")
    started = time.perf_counter()
    checkpoint, flax = open_source(options), None
    if options.flax is None:
        loaded = build_model(checkpoint, options.model, model_options(options))
        sizes = sizes or SIZES[model_info(loaded.name).image_size]
    elif options.reference is None:
        raise ConversionError("--flax needs --reference FILE.py:NAME, the same network in PyTorch.")
    else:
        sizes = sizes or SIZES[224]
        channels = next((value.shape[1] for value in checkpoint.arrays.values() if value.ndim == 4), 3)
        flax = FlaxNetwork(options.flax, (*sizes[0], channels))
        loaded = convert_checkpoint(checkpoint, flax.template)
    checkpoint = loaded.checkpoint
    worst: dict[tuple[str, str], Difference] = {}
    for difference in compare(
        checkpoint, loaded, reference=options.reference, flax=flax, sizes=sizes, tolerance=options.tolerance
    ):
        key = difference.stage, difference.dtype
        if key not in worst or _severity(difference) > _severity(worst[key]):
            worst[key] = difference
    judged = ["float64"] if any(".SRU." in f".{key}" for key in checkpoint.arrays) else list(LIMITS)
    title = f"{checkpoint.source.path.name} as {loaded.name or options.flax}: JAX and {options.reference or 'PyTorch'}"
    show(_table(title, worst, judged))
    for note in loaded.notes:
        print(f"note: {note}")
    if "float32" not in judged:
        print(
            "note: ScConv's gate is a step. If a weight is within rounding error of the threshold, float32 may fall on opposite "
            "sides here and in PyTorch, which shows as a large difference in one pixel: only float64 decides."
        )
    differences = [item for item in worst.values() if item.dtype in judged]
    if any(item.rounding > item.limit for item in differences):
        print("note: this network amplifies rounding, as untrained networks do, so some limits are higher: those in brackets.")
    code, sentence = _conclusion(differences)
    print(f"{sentence} ({time.perf_counter() - started:.0f} s).")
    return code


def _severity(difference: Difference) -> tuple[int, float]:
    return ("equal", "unclear", "differs").index(difference.verdict), difference.value


def _conclusion(differences: list[Difference]) -> tuple[int, str]:
    """Return the exit code and a sentence."""
    for item in differences:
        if item.verdict == "differs":
            return 1, f"Not equal: {item.stage} differs by {item.value:.1e} in {item.dtype}"
    unclear = [item for item in differences if item.verdict == "unclear"]
    if unclear and unclear[0].dtype == "float64":
        return 3, (
            f"Cannot be told in float64: {unclear[0].stage} differs by {unclear[0].value:.1e}, and rounding alone can make that "
            "difference. Verify trained weights instead"
        )
    if unclear:
        return 0, f"Equal within tolerance at every stage in float64; in float32, rounding hides {unclear[0].stage}"
    return 0, "Equal within tolerance at every stage"


def _table(title: str, worst: dict[tuple[str, str], Difference], judged: list[str]) -> Table:
    table = Table(title=title)
    table.add_column("stage")
    limits = {value.dtype: value.limit for value in worst.values()}
    for dtype, limit in limits.items():
        table.add_column(f"{dtype} (limit {limit:.0e})" if dtype in judged else f"{dtype} (not judged)", justify="right")
        table.add_column("largest on")
    for stage in dict.fromkeys(stage for stage, _ in worst):
        cells: list[Text] = []
        for dtype in limits:
            value = worst[stage, dtype]
            raised = f" ({value.rounding:.0e})" if value.rounding > value.limit else ""
            style = {"differs": "bold red", "unclear": "yellow", "equal": ""}[value.verdict] if dtype in judged else ""
            cells += [Text(f"{value.value:.1e}{raised}", style=style), Text(f"{value.images}, {value.size[0]}×{value.size[1]}")]
        table.add_row(stage, *cells)
    return table


def _parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConversionError(f"--sizes {text}: expected pixels, 224 or 193x161.")
    return int(parts[0]), int(parts[-1])
