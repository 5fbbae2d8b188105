"""Explains some images by a trained network: everything at once, by one program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scconv_jax.explanation.capture import examine, find_places
from scconv_jax.explanation.units import Separation
from scconv_jax.images import normalize, pixels
from scconv_jax.inference.run import TrainedModel

BATCH = 16
"""Most images that are explained at once."""


@dataclass(frozen=True, eq=False)
class Explained:
    """The explanation of a network's answers for n images, as NumPy arrays: float32 unless another dtype is given.

    Attributes:
        trained: The network.
        images: The images as it takes them, before normalisation: uint8 `(n, h, w, channels)`.
        probabilities: Of each class, `(n, number of classes)`.
        classes: k classes of each image, int `(n, k)`: the most probable ones, then those that were asked for.
        cams: Stage to Grad-CAM of these classes, `(n, k, h, w)`.
        fields: Stage to effective receptive field, `(h, w)` of the images.
        gates: Path of each self-calibration to its gate, `(n, h, w, c)`.
        separations: Path of each SRU to its two maps, each `(n, h, w, c)`.
        fusions: Path of each CRU to β1 and β2, `(n, 2, c)`.
    """

    trained: TrainedModel
    images: np.ndarray
    probabilities: np.ndarray
    classes: np.ndarray
    cams: dict[str, np.ndarray]
    fields: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    separations: dict[str, Separation]
    fusions: dict[str, np.ndarray]


def explain(trained: TrainedModel, images: Sequence[Any], classes: np.ndarray | None = None, *, top: int = 3) -> Explained:
    """Return Grad-CAM, receptive fields, gates, maps and weights of a trained network for images.

    Args:
        trained: The network, from `load_run`.
        images: Paths of image files, PIL images, or uint8 RGB arrays.
        classes: Classes for Grad-CAM, int `(n, any number)` or `(any number,)` for all images, beside the most probable ones.
        top: Number of the most probable classes.

    Returns:
        The arrays. Stages, blocks and classes are in their order in the network.

    Raises:
        ImageError: An image cannot be decoded; the message names its path or position.
        OSError: A file cannot be opened.
        ValueError: There is no image, the network takes neither 3 channels nor 1, or its logits are not finite.
    """
    if not len(images):
        raise ValueError("There is no image to explain.")
    crops = np.stack([pixels(image, trained.preparation, f"images[{i}]") for i, image in enumerate(images)])
    rows = np.zeros((0,), np.int32) if classes is None else np.asarray(classes, np.int32)
    rows = np.broadcast_to(rows, (len(crops), rows.shape[-1]))
    top = min(top, len(trained.readable_names))

    size = math.ceil(len(crops) / math.ceil(len(crops) / BATCH))  # batches of equal size: one program
    parts, places = [], ()
    for start in range(0, len(crops), size):
        which = np.arange(start, start + size) % len(crops)  # the last batch is filled up
        batch = normalize(jnp.asarray(crops[which]), trained.preparation.mean, trained.preparation.std)
        places = tuple(find_places(trained.model, trained.variables, batch, None).items())
        found = examine(trained.model, trained.variables, batch, jnp.asarray(rows[which]), places, top=top, fields=True)
        captured = found.captured._replace(maps={}, logits=jax.nn.softmax(found.captured.logits))
        parts.append(jax.tree.map(_plain, found._replace(captured=captured)))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(crops)], *parts)
    seen: Any = whole.captured
    if not np.isfinite(seen.logits).all():
        raise ValueError(
            f"The logits of {trained.name} are not finite, so there is nothing to explain. Are these trained weights?"
        )
    fields = {layer: field.mean(0) for layer, field in whole.fields.items()}
    return Explained(
        trained,
        crops,
        seen.logits,
        whole.classes,
        {layer: whole.cams[layer] for layer, _ in places},
        {layer: fields[layer] for layer, _ in places},
        *({path: found[path] for path in sorted(found, key=_natural)} for found in (seen.gates, seen.separations, seen.fusions)),
    )


def _plain(leaf: jax.Array) -> np.ndarray:
    """Return an array as NumPy's, float32 if it is floating."""
    return np.asarray(leaf, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a key by which `layer1/10` comes after `layer1/9`. JAX sorts the names in its trees as texts."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split("/")]


def extent(field: np.ndarray, share: float = 0.9) -> int:
    """Return the side, in pixels, of the smallest square around a field's centre of mass that holds a share of it."""
    total = field.sum()
    if not total > 0:
        return 0
    y, x = (round(float((np.indices(field.shape)[i] * field).sum() / total)) for i in range(2))
    for radius in range(max(field.shape)):
        if field[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].sum() >= share * total:
            return min(2 * radius + 1, max(field.shape))
    return max(field.shape)
