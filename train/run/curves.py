"""`curves.png`: loss and accuracy over epochs."""

import logging
import warnings
from pathlib import Path

import numpy as np

import scconv_jax
from train.run.metrics import best_line, read_metrics


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Plot training and test loss and accuracy over epochs, with the best test accuracy marked. No warning is shown."""
    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # it logs that a font or its cache is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _draw(metrics, picture, title)


def _draw(metrics: Path, picture: Path, title: str) -> None:
    try:
        import matplotlib.figure as mpl
        from matplotlib.ticker import LogLocator, MaxNLocator
    except ImportError as error:
        raise ModuleNotFoundError("curves need matplotlib: pip install 'scconv-jax[train]'") from error

    def points(key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        found = [line for line in lines if key in line]
        return [line["epoch"] for line in found], [scale * line[key] for line in found]

    lines = read_metrics(metrics)
    figure = mpl.Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2)
    training = {"color": "tab:blue", "alpha": 0.6, "linewidth": 1.2}
    testing = {"color": "tab:orange", "linewidth": 1.8, "marker": "o", "markersize": 3.5}
    # With label smoothing, the training loss can lie above the test loss.
    loss_axes.plot(*points("train/loss"), label="training batches (the objective)", **training)
    loss_axes.plot(*points("eval/loss"), label="test images", **testing)
    loss_axes.set(ylabel="cross-entropy", yscale="log")
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.minorticks_off()

    top1_axes.plot(*points("train/top1", 100), label="training batches", **training)
    top1_axes.plot(*points("eval/top1", 100), label="test images", **testing)
    if tested := [line for line in lines if "eval/top1" in line]:
        best, last = best_line(tested), tested[-1]
        label = f"best: {best['eval/top1']:.2%}, epoch {best['epoch']}; last: {last['eval/top1']:.2%}"
        top1_axes.plot(best["epoch"], 100 * best["eval/top1"], "*", color="tab:red", markersize=13, label=label)
    # Stretch the axis near 100 %, where runs differ.
    top1_axes.set_yscale("function", functions=(lambda y: -np.log(102 - y), lambda z: 102 - np.exp(-z)))
    top1_axes.set(ylabel="accuracy, %", ylim=(0, 100.5), yticks=(0, 50, 70, 80, 90, 95, 98, 99, 100))

    for axes in (loss_axes, top1_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    with scconv_jax.files.replacing(picture) as file:
        figure.savefig(file, format="png")
