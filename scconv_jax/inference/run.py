"""A trained network with all that an answer needs: the names of its classes and the preparation of its images.

    trained = scconv_jax.load_run("runs/digits")
    trained.predict(["seven.png", "two.png"])

A training run keeps these in `model.json`, and every `.safetensors` file that is written from it in its metadata.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scconv_jax import images as image_files
from scconv_jax.images import OneImage, Preparation
from scconv_jax.inference.imagenet import imagenet_name, synsets
from scconv_jax.inference.options import inference_options
from scconv_jax.interop.conversion import Variables
from scconv_jax.interop.loading import LoadedWeights, build_model, open_checkpoint
from scconv_jax.models.registry import create_model, model_info, prepare_images
from scconv_jax.weights import WeightsError

BATCH_SIZE = 32
"""Images that a network computes at once, if there are so many."""

_log = logging.getLogger("scconv_jax")


class Answer(NamedTuple):
    """One of the classes that a network finds in an image."""

    label: int
    """Index of the class in the logits."""
    name: str
    """Readable name of the class, also for a synset of ImageNet; the label as text if no names are known."""
    probability: float
    """Softmax of the logits, between 0 and 1."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network with its weights, the names of its classes and the preparation of its images.

    Attributes:
        model: The network, for `model.apply(variables, images, train=False)`.
        variables: Its weights, NumPy arrays.
        name: Its name for `create_model`.
        options: Its options for `create_model`.
        class_names: Name of each class in the order of the logits, as the run has it, or None if no names are known.
        preparation: Preparation of its images: size, resize, mean, std, channels, exif.
        notes: What a user should know: the checkpoint that was taken, what is not recorded and was assumed.
    """

    model: nn.Module
    variables: Variables
    name: str
    options: Mapping[str, Any]
    class_names: tuple[str, ...] | None
    preparation: Preparation
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def readable_names(self) -> tuple[str, ...]:
        """Name of each class, with synsets of ImageNet replaced by their names; the label as text if no names are known."""
        if self.class_names is None:
            return tuple(map(str, range(_num_classes(self.model, self.variables))))
        return tuple(map(imagenet_name, self.class_names))

    def prepare(self, images: OneImage | Iterable[OneImage]) -> np.ndarray:
        """Return the network's input for one image or several: float32 (n, size, size, channels), as `prepare_images` does."""
        return prepare_images(images, self.preparation)

    def predict(
        self, images: OneImage | Iterable[OneImage], top: int = 5, *, batch_size: int = BATCH_SIZE
    ) -> list[tuple[Answer, ...]]:
        """Return the most probable classes of each image, the most probable first.

        Args:
            images: One image or several: paths, bytes of image files, PIL images, or uint8 RGB arrays (h, w, 3) of any size. An
                array (n, h, w, 3) is n images.
            top: Number of classes for each image; all classes if the network has fewer.
            batch_size: Most images that are computed at once.

        Returns:
            A tuple of answers for each image; a list of one for a single image.

        Raises:
            ImageError: An image cannot be decoded; the message names its path or position.
            OSError: A file cannot be opened.
            TypeError: An image has another type, such as an array of floats.
            ValueError: There is no image, an array has another shape, or the network takes neither 3 channels nor 1.
        """
        batch: list[Any] = [images] if image_files.is_single(images) else list(cast("Iterable[OneImage]", images))
        if not batch:
            raise ValueError("images is empty: there is nothing to predict.")
        size = min(batch_size, len(batch))
        pixels = (image_files.pixels(image, self.preparation, f"images[{number}]") for number, image in enumerate(batch))
        return [answers for part in _batches(pixels, size) for answers in self.answers(part, top, size)]

    def answers(self, pixels: Sequence[np.ndarray], top: int = 5, batch_size: int = BATCH_SIZE) -> list[tuple[Answer, ...]]:
        """Return the most probable classes of up to `batch_size` prepared images, uint8 (size, size, channels) each.

        The network is compiled once for each `batch_size`: missing images are filled up with black ones.
        """
        probabilities, classes = self.start(pixels, top, batch_size)
        return self.finish(np.asarray(probabilities), np.asarray(classes), len(pixels))

    def start(self, pixels: Sequence[np.ndarray], top: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
        """Begin to compute `answers` on the device, and return without waiting for it."""
        batch = np.zeros((batch_size, *pixels[0].shape), np.uint8)
        batch[: len(pixels)] = pixels
        return self._compiled(self._on_device, batch, min(top, len(self.readable_names)))

    def finish(self, probabilities: np.ndarray, classes: np.ndarray, count: int) -> list[tuple[Answer, ...]]:
        """Return the answers that `start` has computed for the first `count` images."""
        return [
            tuple(Answer(int(label), self.readable_names[label], float(share)) for label, share in zip(*row, strict=True))
            for row in zip(classes[:count], probabilities[:count], strict=True)
        ]

    @functools.cached_property
    def _on_device(self) -> Variables:
        return jax.device_put(self.variables)

    @functools.cached_property
    def _compiled(self) -> Any:
        def network(variables: Variables, pixels: jax.Array, top: int) -> Any:
            # As in the trainer's test: one program normalises the pixels and applies the network.
            images = image_files.normalize(pixels, self.preparation.mean, self.preparation.std)
            logits = self.model.apply(variables, images, train=False)
            return jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits)), top)

        return jax.jit(network, static_argnums=2, compiler_options=inference_options())


def load_run(source: str | os.PathLike[str], *, checkpoint: str | int = "best", key: str = "") -> TrainedModel:
    """Open a trained network for answers about images.

    Args:
        source: The folder of a training run, or anything that `load_model` takes: a file of weights, the name of published
            weights, an http or https address.
        checkpoint: Which checkpoint of a run to take: "best" (highest test accuracy; the latest if none was tested), "latest", or
            a step.
        key: As for `load_model`.

    Returns:
        The network. A run, and a `.safetensors` file that was written from it, have the names of their classes and the
        preparation of their images. For other files of 1,000 classes, ImageNet's are assumed; else the classes are numbered.
        What was assumed is in `notes`, and logged as warnings under `scconv_jax`.

    Raises:
        WeightsError: The source cannot be read or downloaded, has no such checkpoint, no head, or says nonsense about its images.
        ConversionError: The source fits no network here.
    """
    trained = open_run(source, checkpoint=checkpoint, key=key)
    for note in trained.notes:
        _log.warning("%s: %s", os.path.basename(os.fspath(source)) or source, note)
    return trained


def open_run(source: str | os.PathLike[str], *, checkpoint: str | int = "best", key: str = "") -> TrainedModel:
    """Open a trained network as `load_run` does, and log nothing."""
    loaded = build_model(open_checkpoint(source, key=key, checkpoint=checkpoint), None, {}, fused=True)
    model = loaded.module or create_model(loaded.name, **loaded.options)
    head = f"{model_info(loaded.name).classifier}."
    if loaded.options.get("num_classes") == 0 or any(key.startswith(head) for key in loaded.conversion.kept):
        raise WeightsError(
            f"{loaded.checkpoint.source.path} is {loaded.name} without its head ({head[:-1]}), so it knows no classes. "
            "scconv_jax.load_model(..., num_classes=0) opens it for its features."
        )
    names, note = _class_names(loaded, _num_classes(model, loaded.variables))
    preparation, other_note = _preparation(loaded, model.in_channels)
    notes = (*loaded.notes, *(text for text in (note, other_note) if text))
    return TrainedModel(model, loaded.variables, loaded.name, dict(loaded.options), names, preparation, notes)


def _num_classes(model: nn.Module, variables: Mapping[str, Any]) -> int:
    return variables["params"][getattr(model, "head", "fc")]["kernel"].shape[-1]


def _class_names(loaded: LoadedWeights, count: int) -> tuple[tuple[str, ...] | None, str]:
    """Return the names of the classes, None if they are unknown, and a note for the user, perhaps empty."""
    metadata = loaded.checkpoint.source.metadata
    if "class_names" in metadata:
        found = _parsed(metadata["class_names"])
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            return None, "Its names of classes are not a list of texts, so the classes are numbered."
        if len(found) != count:
            return None, f"It has names of {len(found)} classes, but the network has {count}, so the classes are numbered."
        return tuple(found), ""
    if count == len(synsets()) and "step" not in metadata:
        note = "" if _is_published(loaded) else "It does not say what its 1,000 classes are: ImageNet's are assumed."
        return tuple(synsets().values()), note
    return None, f"The names of its {count} classes are not recorded, so they are numbered."


def _preparation(loaded: LoadedWeights, channels: int) -> tuple[Preparation, str]:
    """Return the preparation of images, and a note for the user, perhaps empty."""
    source, usual = loaded.checkpoint.source, model_info(loaded.name).preparation
    if channels != usual.channels:  # as timm does for grey images, each channel like the mean of the three
        mean, std = ((sum(values) / 3,) * channels for values in (usual.mean, usual.std))
        usual = Preparation(usual.size, usual.resize, mean, std)
    text = source.metadata.get("preparation")
    found, note = asdict(usual) if text is None else _parsed(text), ""
    try:
        if not (found["mean"] and found["std"]):
            note = "The mean and standard deviation of its images are not recorded: ImageNet's are assumed."
            found |= {"mean": usual.mean, "std": usual.std}
        size, resize = (_number(found[name], int) for name in ("size", "resize"))
        mean, std = (tuple(_number(value, (int, float)) for value in found[name]) for name in ("mean", "std"))
        preparation = Preparation(size, resize, mean, std, found.get("exif") is True)
        if resize**2 > image_files.MAX_PIXELS:
            raise ValueError(f"{resize} × {resize} pixels are too many")
        if preparation.channels != channels:
            raise ValueError(f"{preparation.channels} channels, but the network takes {channels}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{source.path} does not say properly how its images are prepared: {text!s:.200} ({error!s:.200}). Expected the "
            "numbers size and resize, and mean and std for each channel."
        ) from error
    if text is None and not (_is_published(loaded) and channels == 3):
        note = (
            f"It does not say how its images are prepared: resize {resize}, crop {size} and the mean and standard deviation of "
            "ImageNet are assumed."
        )
    if note and source.format == "orbax":
        note += f" Resuming the run records them: python -m train.main --workdir {shlex.quote(str(source.path))} --resume"
    return preparation, note


def _is_published(loaded: LoadedWeights) -> bool:
    """Return whether these are the published weights of the network, by the hash in the name of their file."""
    source, published = loaded.checkpoint.source, model_info(loaded.name).sha256
    return bool(published) and published in f"{source.path.name} {source.metadata.get('source', '')}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not np.isfinite(value):
        raise ValueError(f"{value!r:.50} is not a number of the right kind")
    return value


def _batches(items: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yield lists of `size` items, and the rest."""
    batch: list[np.ndarray] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
