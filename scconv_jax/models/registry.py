"""The one table of networks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import linen as nn

from scconv_jax.images import OneImage, Preparation, prepare
from scconv_jax.models import densenet, ghostnet, resnet, scconv_resnet, scnet, wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    **resnet.MODELS,
    **scnet.MODELS,
    **scconv_resnet.MODELS,
    **wide_resnet.MODELS,
    **densenet.MODELS,
    **ghostnet.MODELS,
}

# Address of the weights that the authors of a network published, by its name.
PUBLISHED = scnet.PUBLISHED

TRUNK_OPTIONS = ("num_classes", "output_stride", "dtype", "axis_name")


def list_models() -> list[str]:
    """Return the names of all networks, sorted."""
    return sorted(MODELS)


def list_pretrained() -> list[str]:
    """Return the names of the networks with published weights, sorted: `load_model` takes such a name."""
    return sorted(PUBLISHED)


def create_model(name: str, **options: Any) -> nn.Module:
    """Make a network by its name.

    Args:
        name: one of `list_models()`.
        **options: what the network is to differ in. All take

            - `num_classes`: length of the logits; 1000 for the ImageNet networks, 10 for the small ones;
            - `dtype`: of the computation: `jnp.float32`, `jnp.bfloat16` or, with 64-bit JAX, `jnp.float64`;
            - `axis_name`: mapped axis over which BatchNorm takes its statistics; None for each device its own;

            the residual networks

            - `output_stride`: size of the images over size of the last map: 32, 16 or 8 for the ImageNet networks;

            and those of ScConv

            - `alpha` and `variant`: see `ScConv`.

    Returns:
        A Flax module: `model.init(key, images, train=False)`, `model.apply(variables, images, train=False)`.

    Raises:
        ValueError: for a name or an option that does not exist, whose nearest are named; for less than one class; for
            an `alpha` or a `variant` that cannot be.
    """
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}.{_nearest(str(name), MODELS)} All: {', '.join(list_models())}.")
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f"Model {name!r} has no option {option!r}.{_nearest(option, known)} All: {', '.join(known)}.")
    classes = options.get("num_classes", 1)
    if isinstance(classes, int) and classes < 1:
        raise ValueError(f"num_classes={classes}: a network has at least one class.")
    return MODELS[name](**options)


def prepare_images(images: OneImage | Iterable[OneImage], model: str | Preparation, *, exif: bool = False) -> np.ndarray:
    """Make the float batch that a network expects of images of any size.

    The images are resized, cropped and normalised as torchvision does it in testing, and equal those that the trainer tests on,
    bit for bit. Needs Pillow: `pip install 'scconv-jax[images]'`.

    Args:
        images: one image or several: paths, bytes of image files, PIL images, or uint8 arrays (h, w, 3) in RGB. An array
            (n, h, w, 3) is n images.
        model: name of the network, or how to prepare its images.
        exif: whether to turn files and PIL images as their EXIF orientation says. PyTorch's `ImageFolder` does not.

    Returns:
        float32 (n, size, size, 3); n is 1 for a single image.

    Raises:
        ImageError: (a ValueError in `scconv_jax.images`) an image cannot be decoded; the message names its path or position.
        OSError: a file cannot be opened.
        TypeError: an image is of another type, such as an array of floats.
        ValueError: there is no such network, no image, or an array has another shape.
        ModuleNotFoundError: Pillow is not installed.
    """
    return prepare(images, model if isinstance(model, Preparation) else _preparation(model), exif=exif)


def _preparation(name: str) -> Preparation:
    create_model(name)  # an unknown name is an error
    return Preparation(32, 32) if name.endswith("_small") else Preparation(224, 256)


def options_of(name: str) -> list[str]:
    """Return the names of the options that the network called `name` takes."""
    parameters = inspect.signature(MODELS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ("parent", "name")]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # a constructor that passes on what the trunk takes
        known += [option for option in TRUNK_OPTIONS if option not in known]
    return known


def _nearest(word: str, words: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
