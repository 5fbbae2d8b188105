"""The command `convert`: weights from any source to a `.safetensors` file for Flax or a `.pth` file for PyTorch."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

from scconv_jax import __version__
from scconv_jax.cli.console import show
from scconv_jax.interop.conventions import CONVENTIONS, OWN
from scconv_jax.interop.conversion import Conversion, is_counter, rename_variables
from scconv_jax.interop.loading import Checkpoint, LoadedWeights, build_model, convert_checkpoint, open_checkpoint
from scconv_jax.interop.recognition import template_from_entries
from scconv_jax.interop.variables import save
from scconv_jax.messages import listed
from scconv_jax.weights.files import WeightsError, check_writable, sha256

ANY = "any"
SUFFIXES = (".safetensors", ".pth", ".pt")


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "convert",
        help="convert weights from PyTorch to Flax or back, from a file, a name or an address",
        description="Convert weights. The source's key convention and network are recognised unless they are given. Every entry "
        "on either side is accounted for: any mismatch is an error, and nothing is written.",
    )
    add_source(parser, f"; '{ANY}' for a network of your own: each entry is converted by its kind")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: .safetensors for Flax, .pth or .pt for PyTorch"
    )
    parser.add_argument(
        "--in-channels", type=int, metavar="N", help="channels of the images (default: the source's); kernels for 3 are adapted"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=_convert)


def add_source(parser: argparse.ArgumentParser, more_models: str = "") -> None:
    """Add the arguments for the source of weights; `more_models` extends the help of --model."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file (.pth, .pt, .ckpt, .safetensors), the index of a model in several files, a folder of the Hugging Face hub "
        "or of a run, the name of published weights (scnet50), or an http(s) address",
    )
    parser.add_argument(
        "--key",
        default="",
        metavar="NAME",
        help="which weights to take from a source that has several sets, e.g. state_dict_ema, or the prefix of their keys, e.g. "
        "ema_model (default: the only ones, or the moving average if there is one)",
    )
    add_checkpoint(parser)
    parser.add_argument("--model", metavar="NAME", help=f"the network (default: recognised){more_models}")
    parser.add_argument(
        "--output-stride",
        type=int,
        metavar="N",
        help="output stride of the network, which weights do not show: 32 (default), 16 or 8",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="number of classes; if the source has others, the head is initialised; 0: no head",
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="version of ScConv, if the weights do not show it: paper or 2023-10 (default)"
    )
    names = ", ".join(convention.name for convention in (*CONVENTIONS, OWN))
    parser.add_argument("--naming", metavar="NAME", help=f"key convention of the source (default: recognised): {names}")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="skip the entries that match, e.g. 'ema.*'; repeatable"
    )
    parser.add_argument(
        "--rename",
        nargs=2,
        action="append",
        default=[],
        metavar=("REGEX", "TO"),
        help="rename the source's keys before prefix, key convention and network are recognised; repeatable",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the checkpoint of a run."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="which checkpoint of a run's folder: best (highest test accuracy; the latest if none was tested), latest, or a step "
        "(default: best)",
    )


def open_source(options: argparse.Namespace) -> Checkpoint:
    """Read the source on the command line."""
    return open_checkpoint(
        options.source,
        key=options.key,
        checkpoint=options.checkpoint,
        convention=options.naming,
        rename=[tuple(pair) for pair in options.rename],
        ignore=options.ignore,
    )


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the network's options on the command line."""
    given = {name: getattr(options, name, None) for name in ("output_stride", "num_classes", "variant", "in_channels")}
    return {name: value for name, value in given.items() if value is not None}


def _convert(options: argparse.Namespace) -> None:
    out = Path(options.out)
    _check_out(out, options.force)
    started = time.perf_counter()
    checkpoint = open_source(options)
    metadata: dict[str, Any] = {}
    if options.model == ANY:
        source = checkpoint.source
        if source.is_flax:
            template = rename_variables(source.variables, checkpoint.given.rename)
        else:
            template = template_from_entries(checkpoint.arrays, checkpoint.ignore)
        loaded = convert_checkpoint(checkpoint, template)
    else:
        loaded = build_model(checkpoint, options.model, model_options(options))
        metadata = {"model": loaded.name, "arguments": loaded.options}
    checkpoint = loaded.checkpoint
    kept = ("class_names", "preparation") if not loaded.conversion.kept else ("preparation",)  # a new head has other classes
    metadata |= {name: checkpoint.source.metadata[name] for name in kept if name in checkpoint.source.metadata}
    path = checkpoint.source.path
    name = path.name.encode(errors="surrogateescape").decode(errors="replace")  # may not be UTF-8
    digest = sha256(path) if path.is_file() else ""
    origin = {"source": name, "source_sha256": digest, "naming": checkpoint.convention.name}
    save(out, loaded.variables, {**metadata, **origin, "version": f"scconv_jax {__version__}"})
    _report(options, loaded, digest, time.perf_counter() - started)


def _check_out(out: Path, force: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise WeightsError(f"--out {out}: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, to give the format.")
    if os.path.lexists(out) and not force:
        raise WeightsError(f"{out} exists. Give --force to replace it, or another --out.")
    check_writable(out)  # before the work


def _describe_network(options: argparse.Namespace, loaded: LoadedWeights) -> str:
    """Return the network, its options, and whether they were recognised or given."""
    if not loaded.name:
        return "none: each entry converted by its kind (as given)"
    how = "recognised" if options.model is None else "as given"
    if "variant" in loaded.options and options.variant is not None:
        how += ", variant as given"
    elif loaded.options.get("variant") == "2023-10" and "variant" not in loaded.checkpoint.source.metadata.get("arguments", ""):
        how += ", or --variant paper, which has the same keys"
    return ", ".join([loaded.name, *(f"{key}={value}" for key, value in loaded.options.items())]) + f" ({how})"


def _report(options: argparse.Namespace, loaded: LoadedWeights, digest: str, seconds: float) -> None:
    out, checkpoint = Path(options.out), loaded.checkpoint
    source, conversion, convention = checkpoint.source, loaded.conversion, checkpoint.convention
    recognised = "recognised" if options.naming is None else "as given"
    converted, ignored = len(conversion.converted), len(conversion.ignored)
    beside = f", {len(checkpoint.outside)} beside the network" if checkpoint.outside else ""
    rows = [
        ("source", f"{source.path.name}: {source.format}, {source.bytes:,} bytes"),
        ("SHA-256", digest or "(none for a folder)"),
        ("key convention", f"{convention.name}: {convention.description} ({recognised})"),
        ("network", _describe_network(options, loaded)),
        ("entries", f"{len(source.tensors)} read, {converted} converted, {ignored} ignored{beside}"),
        ("ignored", _explain_ignored(checkpoint, conversion)),
        ("also in the file", listed([f"{key} ({kind})" for key, kind in source.skipped.items()], 20)),
        ("initial values", ", ".join(conversion.kept)),
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(loaded.variables['params'])):,}"),
        ("written", f"{out}: {out.stat().st_size:,} bytes"),
        ("SHA-256", sha256(out)),
        ("time", f"{seconds:.1f} s"),
    ]
    table = Table(title=f"{source.path.name} → {out.name}", show_header=False)
    for row, text in rows:
        if text:
            table.add_row(row, Text(text))
    for note in loaded.notes:
        table.add_row("note", Text(note), style="yellow")
    show(table)


def _explain_ignored(checkpoint: Checkpoint, conversion: Conversion) -> str:
    """Return the ignored entries by kind, with the reason."""
    counters = [key for key in conversion.ignored if is_counter(key)]
    heads = [key for key in conversion.ignored if key in conversion.kept]
    others = [key for key in conversion.ignored if key not in {*counters, *heads}]
    reasons = [f"{len(counters)} num_batches_tracked, PyTorch's counters, which Flax does not have"] if counters else []
    if heads:
        reasons.append(f"{listed(heads, 3)}: the head keeps its initial values")
    if others:
        reasons.append(f"{listed(others, 3)}: skipped ({', '.join(checkpoint.ignore)})")
    return "; ".join(reasons)
