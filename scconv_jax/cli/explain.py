"""The command `explain`: pictures and a page of what a network looks at."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scconv_jax.cli.predict import add_weights, prepare_pillow
from scconv_jax.explanation.explained import Explained, explain
from scconv_jax.explanation.maps import networks_with, require_operator
from scconv_jax.explanation.report import PAGE, PAGES, build, write
from scconv_jax.files import local_path
from scconv_jax.images import SUFFIXES
from scconv_jax.inference.predict import list_images
from scconv_jax.inference.run import TrainedModel, open_run
from scconv_jax.messages import did_you_mean, listed, printable
from scconv_jax.programs import keep_programs
from scconv_jax.weights.files import check_writable

LIMIT = 64
"""Most images of one page."""
FILES = (*SUFFIXES, ".pdf", ".svg", ".json", ".csv", ".txt", ".zip")
"""Suffixes that are no names of folders."""
NEEDS = {"gates": "gates", "sru": "separations", "cru": "fusions"}
"""Operators that --needs can name, and where `Explained` has what they compute."""


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "explain",
        help="show what a network looks at in images, and how its operators weigh",
        description="Write one page (HTML, works without a network) and PNG files: Grad-CAM of every stage, the "
        "calibration gates of self-calibrated convolutions, the SRU's informative and redundant maps, the CRU's channel "
        "weights, and the effective receptive field of every stage.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE|DIR", help=f"image files, or folders of images, up to {LIMIT} images in all"
    )
    add_weights(parser)
    parser.add_argument(
        "--beside",
        metavar="RUN|FILE|NAME",
        help="another network with the same classes, to be shown beside the first, such as the plain one; of a run, --checkpoint "
        "says which checkpoint",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME",
        help="show Grad-CAM of this class, a name or a number; may be repeated (default: the three most probable classes)",
    )
    parser.add_argument(
        "--needs",
        action="append",
        default=[],
        choices=sorted(NEEDS),
        help="stop if the network lacks this operator; may be repeated (default: show what the network has)",
    )
    parser.add_argument(
        "--out",
        default="explanation",
        metavar="DIR|PAGE.html",
        help="folder for the page and the PNG files, or a name for the page alone (default: %(default)s)",
    )
    parser.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    prepare_pillow("explain")
    started = time.perf_counter()
    out = local_path(options.out)
    images = list_images(options.images)
    if len(images) > LIMIT:
        raise ValueError(f"{len(images)} images are too many for one page; give at most {LIMIT}.")
    _check_place(out)
    keep_programs()
    trained = [open_run(options.weights, checkpoint=options.checkpoint)]
    if options.beside:
        which = options.checkpoint if Path(options.beside).is_dir() else "best"
        trained.append(open_run(options.beside, checkpoint=which))
    for network in trained:
        for note in network.notes:
            print(f"note: {network.name}: {printable(note)}", file=sys.stderr)
    for operator in options.needs:
        require_operator(NEEDS[operator], trained[0].name in networks_with(NEEDS[operator]), trained[0].name)
    wanted = [_class(trained[0], text) for text in options.classes]
    if len(trained) == 2:
        _check_same_classes(*trained)
    first = explain(trained[0], images, np.array(wanted, np.int32), top=0 if wanted else 3)
    networks: list[Explained] = [first]
    if len(trained) == 2:
        networks.append(explain(trained[1], images, first.classes, top=0))
    sources = " and ".join(Path(source).name or source for source in (options.weights, options.beside) if source)
    contents = build(_names(images), networks, source=f"Weights: {sources}.")
    try:
        paths = write(out, contents)
    except OSError as error:
        raise ValueError(f"Cannot write {out}: {error.strerror or error}.") from error
    seconds = time.perf_counter() - started
    print(f"Wrote {printable(listed([str(path) for path in paths]))} ({len(images)} images, {seconds:.0f} s).")
    return 0


def _check_place(out: Path) -> None:
    """Raise a ValueError if --out cannot be what it must be, or cannot be written."""
    is_page = out.suffix.lower() in PAGES
    if os.path.lexists(out) and is_page is out.is_dir():
        raise ValueError(f"--out {out} is a {'folder' if is_page else 'file'}; name a folder, or a page that ends in .html.")
    if not is_page and out.suffix.lower() in FILES and not out.exists():
        raise ValueError(f"--out {out}: name a folder, or a page that ends in .html; nothing else is written.")
    existing = out if is_page else next((folder for folder in (out, *out.parents) if folder.exists()), out)
    check_writable(existing if is_page else existing / PAGE)


def _class(trained: TrainedModel, text: str) -> int:
    """Return the position of a class in the logits, given its name or number."""
    for names in (trained.class_names or (), trained.readable_names):
        if text in names:
            return names.index(text)
    count = len(trained.readable_names)
    if text.isdecimal() and int(text) < count:
        return int(text)
    known = trained.readable_names
    raise ValueError(
        f"--class {text}: {trained.name} has no such class.{did_you_mean(text, known)} Its classes: {listed(known)}."
    )


def _check_same_classes(first: TrainedModel, second: TrainedModel) -> None:
    names = [network.class_names or tuple(map(str, range(len(network.readable_names)))) for network in (first, second)]
    if len(names[0]) != len(names[1]):
        raise ValueError(
            f"--beside: {second.name} has {len(names[1])} classes and {first.name} {len(names[0])}; only networks with the same "
            "classes can be compared."
        )
    if first.class_names and second.class_names and names[0] != names[1]:
        at = next(i for i, pair in enumerate(zip(*names, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"--beside: class {at} is {names[1][at]!r} for {second.name} and {names[0][at]!r} for {first.name}; only networks "
            "with the same classes, in the same order, can be compared."
        )


def _names(paths: Sequence[str]) -> list[str]:
    """Return the names of the files, or their paths where names are equal."""
    names = [Path(path).name for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
