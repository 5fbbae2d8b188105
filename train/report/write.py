"""Writes a report: the pictures and `numbers.json` in RUN/report/, then RUN/report.html."""

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import scconv_jax
from train.config import Config
from train.config.files import flatten
from train.data.datasets import Dataset
from train.report import page as html
from train.report.pictures import FEW_CLASSES, accuracy_by_class, draw_all
from train.report.results import Results
from train.run.curves import draw_curves
from train.run.metrics import seconds_of

NUMBERS = "numbers.json"
WHOLE = (
    "Above, the confusion matrix: the darker a place, the larger its share of the true class (by the square root). "
    "Below, the pairs that are confused most often."
)
MISTAKES = 24
"""Mistakes that the page shows."""


def write_report(workdir: Path, config: Config, dataset: Dataset, results: Results, *, step: int, checkpoint: str) -> Path:
    """Write the report of a run and return the path of its page.

    Args:
        workdir: The run's folder.
        config: The run's config.
        dataset: Its images.
        results: What the network says about the test images.
        step: The step of the checkpoint.
        checkpoint: Which one it is, in words.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    names = [scconv_jax.imagenet_name(name) for name in dataset.classes]

    def image(index: int) -> np.ndarray:
        out = np.empty(dataset.image_shape, np.uint8)
        dataset.test.load(index, (), out)
        return out

    draw_all(results, names, image, folder)
    title = f"{config.model.name} on {config.data.name}"
    metrics = workdir / "metrics.jsonl"
    if metrics.exists():
        draw_curves(metrics, workdir / "curves.png", title=title)
    numbers = _numbers(results, dataset, step, seconds_of(workdir))
    with scconv_jax.files.replacing(folder / NUMBERS) as file:
        file.write_text(json.dumps(numbers, indent=1) + "\n")
    with scconv_jax.files.replacing(workdir / "report.html") as file:
        file.write_text(_page(workdir, config, dataset, results, names, image, numbers, title, checkpoint), encoding="utf-8")
    return workdir / "report.html"


def _numbers(results: Results, dataset: Dataset, step: int, seconds: float | None) -> dict[str, Any]:
    right, count = accuracy_by_class(results, dataset.num_classes)
    return {
        "step": step,
        "images": len(results.label),
        "unreadable": len(dataset.test) - len(results.label),
        "top1": float(results.right.mean()),
        "mean_confidence": float(results.confidence.mean()),
        "ece": results.calibration()[-1],
        "seconds": None if seconds is None else round(seconds, 1),
        "classes": [
            {"name": name, "images": int(images), "right": int(hits)}
            for name, hits, images in zip(dataset.classes, right, count, strict=True)
        ],
    }


def _page(
    workdir: Path,
    config: Config,
    dataset: Dataset,
    results: Results,
    names: list[str],
    image: Any,
    numbers: dict[str, Any],
    title: str,
    checkpoint: str,
) -> str:
    folder, mistakes, classes = workdir / "report", results.mistakes(), len(names)
    figures = {
        "test accuracy": f"{numbers['top1']:.2%}",
        "test images": f"{numbers['images']:,}",
        "mistakes": f"{len(mistakes):,}",
        "calibration error (ECE)": f"{numbers['ece']:.2%}",
    }
    if numbers["seconds"] is not None:
        figures["training time"] = _duration(numbers["seconds"])
    left_out = f" {numbers['unreadable']:,} test images could not be read." if numbers["unreadable"] else ""
    rows = [
        (
            image(int(results.index[place])),
            names[int(results.label[place])],
            names[int(results.predicted[place])],
            float(results.confidence[place]),
        )
        for place in mistakes[:MISTAKES]
    ]
    of_class = sorted(zip(names, numbers["classes"], strict=True), key=lambda row: row[1]["right"] / max(1, row[1]["images"]))
    table = html.table(
        ["class", "folder", "accuracy", "right", "images"],
        [
            (name, row["name"], f"{row['right'] / row['images']:.1%}" if row["images"] else "–", row["right"], row["images"])
            for name, row in of_class
        ],
    )
    kind = "Row: true class. Column: predicted class." if classes <= FEW_CLASSES else WHOLE
    calibration = (
        "A network is calibrated if, of the images that it is 80 % sure of, 80 % are right. ECE is the mean difference between "
        f"confidence and accuracy, in {len(results.calibration()[0])} bins. Here the mean confidence is "
        f"{numbers['mean_confidence']:.2%}, the accuracy {numbers['top1']:.2%}."
    )
    shown = f"The {len(rows)} of {len(mistakes):,} that the network was surest of." if rows else "There are no mistakes."
    sections = [
        ("Worst mistakes", f"<p>{html.text(shown)}</p>{html.cards(rows)}"),
        ("Confusions", f"<p>{kind}</p>" + html.picture(folder / "confusion.png", "confusions of classes")),
        (
            "Accuracy by class",
            html.picture(folder / "classes.png", "accuracy of each class") + html.details("All classes as a table", table),
        ),
        ("Calibration", f"<p>{html.text(calibration)}</p>" + html.picture(folder / "calibration.png", "reliability diagram")),
    ]
    if (workdir / "curves.png").exists():
        sections.append(("Curves", html.picture(workdir / "curves.png", "loss and accuracy by epoch", "large")))
    settings = [(name, repr(value)) for name, value in flatten(dataclasses.asdict(config)).items()]
    sections += [
        ("Config", html.details("All fields", html.table([], settings))),
        ("Environment", html.table([], list(_environment().items()))),
    ]
    return html.page(
        title, f"{workdir.resolve().name}, {checkpoint}. {dataset.num_classes:,} classes.{left_out}", figures, sections
    )


def _environment() -> dict[str, str]:
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind}, {jax.process_count()} host(s)",
        "Python": platform.python_version(),
        **{
            name: sys.modules[name].__version__ for name in ("scconv_jax", "jax", "flax", "optax", "numpy") if name in sys.modules
        },
        "system": f"{platform.system()} {platform.machine()}",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
