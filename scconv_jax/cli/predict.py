"""The command `predict`: what a trained network finds in images."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from scconv_jax.cli.convert import add_checkpoint
from scconv_jax.files import local_path
from scconv_jax.inference.predict import Prediction, list_images, predict_each
from scconv_jax.inference.run import BATCH_SIZE, TrainedModel, open_run
from scconv_jax.messages import printable, shortened
from scconv_jax.programs import keep_programs
from scconv_jax.weights.files import WeightsError, check_writable, replacing

SUFFIXES = (".csv", ".json")


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "predict",
        help="classify images with the network of a training run or a file of weights",
        description="Print the most probable classes of each image, one line per image. Files that cannot be read are named and "
        "skipped. Exit code: 0, 1 if an image was skipped, or 2 for bad input.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE|DIR", help="image files, or folders of images (with all folders below)"
    )
    add_weights(parser)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes for each image (default: 5)")
    parser.add_argument("--out", metavar="FILE", help="write the answers to FILE, .csv or .json, instead of printing them")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"images computed at once (default: {BATCH_SIZE})"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads that decode images (default: one per core)")
    parser.set_defaults(run=_predict)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a trained network."""
    parser.add_argument(
        "--weights",
        required=True,
        metavar="RUN|FILE|NAME",
        help="the folder of a training run, a file of weights (.safetensors, .pth), or the name of published weights (scnet50)",
    )
    add_checkpoint(parser)


def prepare_pillow(extra: str) -> None:
    """Let Pillow read large images and say nothing about those that it can read.

    Raises:
        ModuleNotFoundError: Pillow is not installed; `extra` is the project's extra that has it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError(f"Images need Pillow: pip install 'scconv-jax[{extra}]'") from error
    Image.MAX_IMAGE_PIXELS = None  # as in the trainer: `scconv_jax.images.MAX_PIXELS` is the only limit
    warnings.filterwarnings("ignore", module="PIL")


def open_weights(options: argparse.Namespace) -> TrainedModel:
    """Open the trained network on the command line, and say on stderr what it is and what was assumed."""
    keep_programs()
    trained = open_run(options.weights, checkpoint=options.checkpoint)
    print(f"{printable(options.weights)}: {trained.name}, {len(trained.readable_names)} classes", file=sys.stderr)
    for note in trained.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    return trained


def _predict(options: argparse.Namespace) -> int:
    prepare_pillow("images")
    _check(options)
    paths = list_images(options.images)
    trained, started = open_weights(options), time.perf_counter()
    predictions, skipped = [], []
    settings = {"top": options.top, "batch_size": options.batch_size, "threads": options.threads}
    for prediction in _with_progress(predict_each(trained, paths, **settings), len(paths)):
        if prediction.error:
            print(f"skipped {printable(prediction.image)}: {printable(prediction.error)}", file=sys.stderr)
        (skipped if prediction.error else predictions).append(prediction)
        if not prediction.error and not options.out:
            print(_line(prediction))
    if not predictions:
        raise ValueError(f"None of the {len(paths)} files is an image that can be read.")
    if options.out:
        _write(local_path(options.out), options, trained, predictions, skipped)
    seconds = time.perf_counter() - started
    where = f"; answers in {printable(options.out)}" if options.out else ""
    print(f"{len(predictions):,} images in {seconds:.1f} s, {len(skipped):,} skipped{where}", file=sys.stderr)
    return 1 if skipped else 0


def _check(options: argparse.Namespace) -> None:
    """Raise an error about an option before any work."""
    for name in ("top", "batch_size", "threads"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} {number} must be 1 or more.")
    if options.out:
        out = local_path(options.out)
        if out.suffix not in SUFFIXES:
            raise WeightsError(f"--out {out}: its name must end in {' or '.join(SUFFIXES)}, to give the format.")
        check_writable(out)


def _with_progress(predictions: Iterable[Prediction], count: int) -> Iterator[Prediction]:
    """Yield the predictions with a progress bar on stderr, if that is a terminal and there are several images."""
    hidden = count == 1 or not sys.stderr.isatty()
    # Redirected, what is printed to a pipe would go to the terminal.
    bar = Progress(console=Console(stderr=True), disable=hidden, transient=True, redirect_stdout=sys.stdout.isatty())
    with bar:
        task = bar.add_task("predicting", total=count)
        for prediction in predictions:
            bar.advance(task)
            yield prediction


def _line(prediction: Prediction) -> str:
    answers = (f"{shortened(answer.name)} {answer.probability:.1%}" for answer in prediction.answers)
    return printable(f"{prediction.image}: {', '.join(answers)}")


def _write(
    out: Path, options: argparse.Namespace, trained: TrainedModel, predictions: list[Prediction], skipped: list[Prediction]
) -> None:
    rows = [(prediction.image, list(_rows(trained, prediction))) for prediction in predictions]
    with replacing(out) as path:
        if out.suffix == ".csv":
            with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                table = csv.writer(file)
                table.writerow(["image", "rank", *rows[0][1][0]])
                for image, answers in rows:
                    table.writerows([image, rank, *answer.values()] for rank, answer in enumerate(answers, 1))
            return
        found = {
            "weights": options.weights,
            "model": trained.name,
            "images": [{"image": image, "answers": answers} for image, answers in rows],
            "skipped": [{"image": prediction.image, "reason": prediction.error} for prediction in skipped],
        }
        path.write_text(json.dumps(found, indent=1) + "\n")


def _rows(trained: TrainedModel, prediction: Prediction) -> Iterator[dict[str, Any]]:
    """Yield the answers as rows: label, the run's name of the class, the readable one, and the probability."""
    for label, name, probability in prediction.answers:
        of_run = trained.class_names[label] if trained.class_names else ""
        yield {"label": label, "class": of_run, "name": name, "probability": float(f"{probability:.6g}")}
