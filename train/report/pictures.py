"""The pictures of a report, drawn with matplotlib: confusions, accuracy by class, calibration, the worst mistakes."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import scconv_jax
from train.report.results import Results

FEW_CLASSES = 25
"""Most classes for which the confusion matrix has names and numbers. For more, the most frequent confusions stand below it."""
ROWS = 30
"""Bars in a picture."""
MISTAKES = 12
"""Images in the picture of the worst mistakes."""
BLUE, ORANGE = "#3b6fb6", "#e07b39"


def draw_all(results: Results, names: Sequence[str], image: Callable[[int], np.ndarray], folder: Path) -> None:
    """Draw `confusion.png`, `classes.png`, `calibration.png` and `worst.png`. No warning is shown.

    Args:
        results: The predictions.
        names: Readable name of each class.
        image: Test image by its index: uint8 (h, w, c).
        folder: Where to write.
    """
    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # it logs that a font or its cache is missing
    names = [shortened(name) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: a font lacks the letters of a name
        _save(_confusion(results, names), folder / "confusion.png")
        _save(_classes(results, names), folder / "classes.png")
        _save(_calibration(results), folder / "calibration.png")
        _save(_worst(results, names, image), folder / "worst.png")


def shortened(name: str, most: int = 26) -> str:
    """Return a name for a picture: printable, short, and without matplotlib's sign of a formula."""
    return scconv_jax.messages.shortened(scconv_jax.messages.printable(name), most).replace("$", r"\$")


def _figure(width: float, height: float, **several: Any) -> tuple[Any, Any]:
    try:
        import matplotlib.figure as mpl
    except ImportError as error:
        raise ModuleNotFoundError("a report needs matplotlib: pip install 'scconv-jax[train]'") from error
    figure = mpl.Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(**several)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with scconv_jax.files.replacing(path) as file:
        figure.savefig(file, format="png")


def _confusion(results: Results, names: Sequence[str]) -> Any:
    matrix = results.confusion(len(names))
    if len(names) > FEW_CLASSES:
        return _pairs(matrix, names)
    size = 2.6 + 0.36 * len(names)
    figure, axes = _figure(max(5.0, size), max(4.4, size - 0.6))
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(matrix):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    steep = any(len(name) > 2 for name in names)
    axes.set_xticks(range(len(names)), names, rotation=90 if steep else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title="Test images by true and predicted class")
    return figure


def _pairs(matrix: np.ndarray, names: Sequence[str]) -> Any:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    order = [place for place in np.argsort(-wrong, axis=None, kind="stable")[:ROWS] if wrong.flat[place]]
    pairs = [divmod(int(place), len(names)) for place in order]
    height = 1.4 + 0.24 * max(1, len(pairs))
    figure, (whole, axes) = _figure(7.4, 6.6 + height, nrows=2, height_ratios=(6.6, height))
    whole.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="antialiased")
    whole.set(xlabel="predicted class, by number", ylabel="true class, by number")
    whole.set_title(f"Confusion matrix of {len(names):,} classes")
    labels = [f"{names[true]} → {names[predicted]}" for true, predicted in pairs]
    _bars(axes, labels, [int(wrong[pair]) for pair in pairs], ORANGE, "{:d}")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="test images", title="Most frequent confusions (true → predicted)")
    return figure


def _classes(results: Results, names: Sequence[str]) -> Any:
    right, count = accuracy_by_class(results, len(names))
    tested = [label for label in range(len(names)) if count[label]]
    order = sorted(tested, key=lambda label: right[label] / count[label])[:ROWS]
    figure, axes = _figure(6.4, 1.4 + 0.24 * len(order))
    _bars(axes, [names[label] for label in order], [100 * right[label] / count[label] for label in order], BLUE, "{:.1f}")
    title = "Test accuracy by class" + (f": the {ROWS} worst of {len(tested):,}" if len(tested) > ROWS else "")
    axes.set(xlabel="accuracy, %", xlim=(0, 112), xticks=range(0, 101, 20), title=title)
    return figure


def _bars(axes: Any, labels: Sequence[str], values: Sequence[float], colour: str, style: str) -> None:
    bars = axes.barh(range(len(labels)), values, color=colour, height=0.7)
    axes.bar_label(bars, [style.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.margins(y=0.02)
    axes.invert_yaxis()


def _calibration(results: Results) -> Any:
    count, confidence, accuracy, error = results.calibration()
    figure, axes = _figure(5.4, 5.0)
    used = count > 0
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="perfect calibration")
    sizes = 20 + 380 * count[used] / count.max()
    axes.scatter(confidence[used], accuracy[used], sizes, color=BLUE, alpha=0.75, label="test images, area by number")
    axes.plot(confidence[used], accuracy[used], color=BLUE, linewidth=1)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.05), xlabel="confidence", ylabel="accuracy", title=f"Calibration: ECE {error:.2%}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right", markerscale=0.5)
    return figure


def _worst(results: Results, names: Sequence[str], image: Callable[[int], np.ndarray]) -> Any:
    import matplotlib.figure as mpl

    chosen = results.mistakes()[:MISTAKES]
    rows = max(1, -(-len(chosen) // 4))
    figure = mpl.Figure(figsize=(8.4, 0.5 + 2.5 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False).flat
    for axes in grid:
        axes.axis("off")
    for axes, place in zip(grid, chosen, strict=False):
        axes.imshow(image(int(results.index[place])).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        true, predicted = (names[int(labels[place])] for labels in (results.label, results.predicted))
        axes.set_title(f"{predicted} {results.confidence[place]:.0%}\ntrue: {true}", fontsize=8)
    title = "The most confident mistakes" if len(chosen) else "No mistakes on the test images"
    figure.suptitle(title)
    return figure


def accuracy_by_class(results: Results, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many test images of each class were predicted rightly, and how many there are: int64 (classes,) each."""
    right = np.bincount(results.label[results.right], minlength=classes)
    return right, np.bincount(results.label, minlength=classes)
