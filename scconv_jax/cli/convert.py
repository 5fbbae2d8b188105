"""The command `convert`: weights from any source to a file of this project's, or of PyTorch's."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

from scconv_jax import __version__
from scconv_jax.cli.console import show
from scconv_jax.interop.conventions import NAMINGS, OWN
from scconv_jax.interop.conversion import Match, is_counter
from scconv_jax.interop.loading import Entries, Filled, choose, fill, fill_model, open_entries
from scconv_jax.interop.recognition import kinds
from scconv_jax.models.registry import create_model
from scconv_jax.weights import save
from scconv_jax.weights.files import WeightsError, check_place, sha256

ANY = "any"
SUFFIXES = (".safetensors", ".pth", ".pt")


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "convert",
        help="weights of PyTorch to Flax and back, by file, name or address",
        description="Convert weights. Whose names the source has, and which network it is of, is recognised where not given. "
        "Every entry on either side is accounted for; what does not fit is an error, and nothing is written.",
    )
    add_source(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".safetensors for Flax, .pth or .pt for PyTorch")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=_convert)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what says where weights come from and what they are."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file (.pth, .pt, .safetensors), a run's folder, the name of published weights (scnet50), or an http(s) address",
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"the network (default: recognised); '{ANY}': no network, each entry by its kind"
    )
    parser.add_argument("--output-stride", type=int, metavar="N", help="32, 16 or 8, which weights do not show (default: 32)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="other than the source's: the head is drawn anew")
    parser.add_argument("--variant", metavar="NAME", help="of ScConv, where the weights do not show it: paper or 2023-10")
    parser.add_argument(
        "--naming", metavar="NAME", help=f"whose names (default: recognised): {', '.join(n.name for n in (*NAMINGS, OWN))}"
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="pass over entries: 'ema.*'; repeatable")
    parser.add_argument(
        "--rename",
        nargs=2,
        action="append",
        default=[],
        metavar=("REGEX", "TO"),
        help="change entries' names, after the naming's own changes; repeatable",
    )


def open_source(options: argparse.Namespace) -> Entries:
    """Read the source that the command line names."""
    return open_entries(
        options.source, convention=options.naming, rename=[tuple(pair) for pair in options.rename], ignore=options.ignore
    )


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the network that the command line gives."""
    given = {name: getattr(options, name) for name in ("output_stride", "num_classes", "variant")}
    return {name: value for name, value in given.items() if value is not None}


def _convert(options: argparse.Namespace) -> None:
    out = Path(options.out)
    _check_out(out, options.force)
    started = time.perf_counter()
    found = open_source(options)
    if options.model == ANY:
        name, arguments = "", {}
        filled = fill(found, found.source.variables or kinds(found.arrays, found.ignore))
    else:
        name, arguments = choose(found, options.model, model_options(options))
        filled = fill_model(found, name, create_model(name, **arguments))
    metadata = {"model": name, "arguments": arguments} if name else {}
    source = found.source.path.name.encode(errors="surrogateescape").decode(errors="replace")  # names need not be UTF-8
    origin = {"source": source, "source_sha256": found.source.sha256, "naming": found.naming.name}
    save(out, filled.variables, {**metadata, **origin, "version": f"scconv_jax {__version__}"})
    seconds = time.perf_counter() - started
    _report(options, found, filled, _network(options, found, name, arguments), out, seconds)


def _check_out(out: Path, force: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise WeightsError(
            f"--out {out}: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, which says the format."
        )
    if os.path.lexists(out) and not force:
        raise WeightsError(f"{out} exists. Give --force to replace it, or another --out.")
    check_place(out)  # before the work


def _network(options: argparse.Namespace, found: Entries, name: str, arguments: dict[str, Any]) -> str:
    """The network in words, and how it is known."""
    if not name:
        return "none: each entry by its kind (as given)"
    how = "recognised" if options.model is None else "as given"
    if "variant" in arguments and options.variant is not None:
        how += ", its variant as given"
    elif arguments.get("variant") == "2023-10" and "variant" not in found.source.metadata.get("arguments", ""):
        how += ", or --variant paper, which has the same entries"
    return ", ".join([name, *(f"{key}={value}" for key, value in arguments.items())]) + f" ({how})"


def _report(options: argparse.Namespace, found: Entries, filled: Filled, network: str, out: Path, seconds: float) -> None:
    source, matched, waited = found.source, filled.match, found.opinion.seconds
    times = f"{seconds - waited:.1f} s" + (f", and {waited:.1f} s for PyTorch's loader" if waited >= 0.1 else "")
    rows = {
        "source": f"{source.path.name}: {source.format}, {source.bytes:,} bytes",
        "PyTorch's loader": found.opinion.text,
        "SHA-256": source.sha256 or "(a folder has none)",
        "names": f"{found.naming.name}: {found.naming.description} ({'recognised' if options.naming is None else 'as given'})",
        "network": network,
        "entries": f"{len(found.arrays)} read, {len(matched.converted)} converted, {len(matched.ignored)} ignored",
        "ignored": _reasons(found, matched),
        "beside them": _listed([f"{key} ({kind})" for key, kind in source.skipped.items()], most=20),
        "as initialised": ", ".join(matched.unfilled),
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(filled.variables['params'])):,}",
        "written": f"{out}: {out.stat().st_size:,} bytes",
        "SHA-256 ": sha256(out),
        "time": times,
    }
    table = Table(title=f"{source.path.name} → {out.name}", show_header=False)
    for row, text in rows.items():
        if text:
            table.add_row(row.strip(), Text(text))
    for note in filled.notes:
        table.add_row("note", Text(note), style="yellow")
    show(table)


def _reasons(found: Entries, matched: Match) -> str:
    """Why entries were ignored: kinds of them, each with its number and reason."""
    counters = [name for name in matched.ignored if is_counter(name)]
    heads = [name for name in matched.ignored if name in matched.unfilled]
    others = [name for name in matched.ignored if name not in {*counters, *heads}]
    reasons = [f"{len(counters)} num_batches_tracked, PyTorch's counters, which Flax has not"] if counters else []
    if heads:
        reasons.append(f"{_listed(heads)}: kept as initialised")
    if others:
        reasons.append(f"{_listed(others)}: to be passed over ({', '.join(found.ignore)})")
    return "; ".join(reasons)


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
