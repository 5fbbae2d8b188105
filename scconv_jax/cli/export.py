"""The command `export`: a trained network as an ONNX or StableHLO file, or as a folder of the Hugging Face hub's form."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table
from rich.text import Text

from scconv_jax.cli.console import show
from scconv_jax.inference.export import PLATFORMS, SUFFIXES, TOLERANCE, Exported, export
from scconv_jax.inference.export_check import DYNAMIC, ExportError


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "export",
        help="write a trained network for other programs: ONNX, StableHLO, or a folder in the form of the Hugging Face hub",
        description="Export a trained network, with the names of its classes and the preparation of its images. The file is "
        "loaded back by the program that runs it (ONNX Runtime, JAX) and compared with the network on random images; if it "
        "differs, nothing is written.",
    )
    parser.add_argument(
        "--weights", required=True, metavar="SOURCE", help="a run's folder, a file of weights, or the name of published weights"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="FILE.onnx, FILE.stablehlo, or a folder for hub")
    parser.add_argument("--format", choices=list(SUFFIXES), help="default: told by the suffix of --out")
    parser.add_argument(
        "--no-fuse", action="store_true", help="keep norms and convolutions apart; by default they are fused, with equal logits"
    )
    parser.add_argument("--batch", default=DYNAMIC, metavar="N", help=f"number of images, or {DYNAMIC} for any (default)")
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="PX",
        help=f"height and width of the images, or {DYNAMIC} for all multiples of the output stride (default: the size of the "
        "run's test images)",
    )
    parser.add_argument("--channels-first", action="store_true", help="ONNX only: take images (n, c, h, w), not (n, h, w, c)")
    parser.add_argument(
        "--platforms",
        nargs="+",
        default=list(PLATFORMS),
        choices=[*PLATFORMS, "rocm"],
        metavar="NAME",
        help=f"StableHLO only: {', '.join(PLATFORMS)} (default: all three) or rocm; cpu must be among them",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"largest accepted difference, relative to the largest logit (default: {TOLERANCE:g})",
    )
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="checkpoint of a run: best (default), latest, or a step"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    exported = export(
        options.weights,
        options.out,
        options.format,
        fuse=not options.no_fuse,
        batch=_number("--batch", options.batch),
        size=_size(options.size),
        channels_first=options.channels_first,
        platforms=options.platforms,
        tolerance=options.tolerance,
        checkpoint=options.checkpoint,
        force=options.force,
    )
    table = Table(show_header=False, box=None, padding=(0, 1))
    for key, value in _rows(exported):
        table.add_row(Text(key), Text(value))
    show(table)


def _number(flag: str, text: str) -> Any:
    if text == DYNAMIC:
        return DYNAMIC
    if not text.isdecimal() or int(text) < 1:
        raise ExportError(f"{flag} {text}: expected a positive number, or {DYNAMIC}.")
    return int(text)


def _size(texts: list[str] | None) -> Any:
    if texts is None or texts == [DYNAMIC]:
        return texts and DYNAMIC
    if len(texts) > 2 or DYNAMIC in texts:
        raise ExportError(f"--size {' '.join(texts)}: expected height and width, such as 224 224, or {DYNAMIC}.")
    return tuple(_number("--size", text) for text in texts) * (3 - len(texts))


def _rows(exported: Exported) -> list[tuple[str, str]]:
    rows = [
        ("written", f"{exported.path}, {exported.size:,} bytes"),
        ("format", f"{exported.format}, {exported.details}"),
        ("input", f"images, float32 {_shape(exported.images)}"),
        ("output", f"logits, float32 {_shape(exported.logits)}"),
    ]
    if symbols := [name for name in "nhw" if any(isinstance(size, str) and size.endswith(name) for size in exported.images)]:
        rows.append(("open sizes", ", ".join(symbols)))
    compared = exported.comparison
    if compared is None:
        return [*rows, ("loaded back", "weights, class names and preparation are equal")]
    images = " and ".join(map(_shape, compared.images))
    result = f"equal within {compared.difference:.1e} of the largest logit, on random images {images}"
    if compared.rounding:
        result += f" (the network's own rounding error is {compared.rounding:.1e})"
    return [*rows, ("loaded back", result)]


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
