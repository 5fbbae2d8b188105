"""What a network says about each test image, and the figures made from it: confusions, accuracy by class, calibration."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from train.config import Config, ConfigError
from train.setup import TrainingSetup, over_test_images
from train.step import AXIS

BINS = 15
"""Bins of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""


@dataclass(frozen=True)
class Results:
    """Predictions for the test images that could be read, in the order of the data set: arrays (n,)."""

    index: np.ndarray
    """Position in the test images: int64."""
    label: np.ndarray
    """True class: int32."""
    predicted: np.ndarray
    """Most probable class: int32."""
    confidence: np.ndarray
    """Probability of the predicted class: float32."""
    of_truth: np.ndarray
    """Probability of the true class: float32."""

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is right: bool (n,)."""
        return self.label == self.predicted

    def mistakes(self) -> np.ndarray:
        """Return the positions in these arrays of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]

    def confusion(self, classes: int) -> np.ndarray:
        """Return how many images of each class (row) were predicted to be of each class (column): int64 (classes, classes)."""
        pairs = self.label.astype(np.int64) * classes + self.predicted
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def calibration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Return the reliability diagram, and the expected calibration error (ECE).

        Returns:
            For each of `BINS` equal bins of confidence: the number of images, their mean confidence and their accuracy (both NaN
            without images), arrays (BINS,); the mean difference of the last two over all images.
        """
        bins = np.clip(np.ceil(self.confidence * BINS).astype(int) - 1, 0, BINS - 1)
        count = np.bincount(bins, minlength=BINS)
        with np.errstate(invalid="ignore"):
            confidence = np.bincount(bins, self.confidence, BINS) / count
            accuracy = np.bincount(bins, self.right, BINS) / count
        error = float(np.nansum(count * np.abs(confidence - accuracy)) / count.sum())
        return count, confidence, accuracy, error


def make_results(setup: TrainingSetup, config: Config) -> Callable[[Any], Results]:
    """Return (state on the devices) → `Results`. All hosts call it and get the same."""
    predict = setup.parallel.over_devices(partial(predict_step, model=setup.model, normalize=setup.normalize), inference=True)

    def results(state: Any) -> Results:
        found = over_test_images(setup, config, partial(predict, state))
        arrays = {name: np.concatenate([np.asarray(batch[name]) for batch in found]) for name in found[0]}
        readable = np.flatnonzero(arrays.pop("weight"))
        if not len(readable):
            raise ConfigError("no image of the test set can be read")
        return Results(index=readable, **{name: array[readable] for name, array in arrays.items()})

    return results


def predict_step(state: Any, batch: dict[str, Array], *, model: Any, normalize: Callable[[Array], Array]) -> dict[str, Array]:
    """Return for each image of the global batch, on every device: `label`, `predicted`, `confidence`, `of_truth`, `weight`."""
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    probabilities = jax.nn.softmax(model.apply(variables, normalize(batch["image"]), train=False))
    own = {
        "label": batch["label"],
        "predicted": probabilities.argmax(-1).astype(jnp.int32),
        "confidence": probabilities.max(-1).astype(jnp.float32),
        "of_truth": jnp.take_along_axis(probabilities, batch["label"][:, None], axis=1)[:, 0].astype(jnp.float32),
        "weight": batch["weight"],
    }

    def gathered(x: Array) -> Array:  # by a sum, whose result every device is known to have
        everywhere = jnp.zeros((jax.lax.psum(1, AXIS), *x.shape), x.dtype)
        return jax.lax.psum(everywhere.at[jax.lax.axis_index(AXIS)].set(x), AXIS).reshape(-1)

    return jax.tree.map(gathered, own)
