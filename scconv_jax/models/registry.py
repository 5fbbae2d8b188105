"""All networks by name: `create_model`, `list_models`, `model_info`, `feature_info`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from flax import linen as nn

from scconv_jax.images import OneImage, Preparation, prepare
from scconv_jax.messages import did_you_mean, nearest
from scconv_jax.models import densenet, ghostnet, resnet, scconv_resnet, scnet, wide_resnet
from scconv_jax.models.network import Feature, Network
from scconv_jax.models.spec import ModelSpec

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for file in (resnet, scnet, scconv_resnet, wide_resnet, densenet, ghostnet)
    for spec in file.SPECS
}  # fmt: skip

# Address of the published weights by the name of the network.
PUBLISHED = {name: spec.weights for name, spec in MODELS.items() if spec.weights}

# Advice for options that other libraries have.
_NO_DROP_PATH = "It has no residual blocks that training could leave out. For dropout before the head, use dropout."
_MAPS = (
    'model.apply(variables, images, train=False, method="features") returns the map of every stage; feature_info describes them.'
)
_BUILD = (
    "A network by name has a fixed structure: build another with the classes of scconv_jax.models, such as ResNet or WideResNet."
)
ADVICE = {
    "drop_rate": "Use dropout, before the head.",
    **dict.fromkeys(("drop_path_rate", "drop_connect_rate", "stochastic_depth_prob"), "Use drop_path."),
    "drop_block_rate": "There is no DropBlock; drop_path leaves out whole blocks.",
    **dict.fromkeys(("freeze", "frozen_stages"), 'Use frozen=("stem", "layer1"), and frozen_mask for the optimizer.'),
    **dict.fromkeys(("remat", "grad_checkpointing", "with_cp"), "Use rematerialise=True."),
    **dict.fromkeys(("features_only", "out_indices"), _MAPS),
    **dict.fromkeys(("checkpoint_path", "weights"), "Load weights with scconv_jax.load_model(SOURCE)."),
    "in_chans": "Use in_channels.",
    "classes": "Use num_classes.",
    **dict.fromkeys(("key", "rngs", "seed"), "Weights are made by model.init(key, images, train=False)."),
    **dict.fromkeys(("train", "training"), "Say it in the call: model.apply(variables, images, train=False)."),
    **dict.fromkeys(
        ("img_size", "input_size", "input_shape"), "A network accepts images of any size from its smallest on; see model_info."
    ),
    **dict.fromkeys(("act_layer", "norm_layer", "zero_init_residual", "groups", "cardinality", "base_width", "layers"), _BUILD),
    **dict.fromkeys(("global_pool", "pooling"), f'The head averages the last map; method="pooled" returns the average. {_MAPS}'),
    "num_features": "The length of the pooled vector is model.num_features; the channels of maps are in feature_info.",
    "include_top": "Use num_classes=0 for a network without head.",
    "replace_stride_with_dilation": "Use output_stride=16 or output_stride=8.",
}


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Return the names of networks, sorted.

    Args:
        pattern: Shell pattern for the names, such as `"scnet*"`.
        pretrained: Whether to list only networks with published weights, which `load_model` takes by name.
    """
    return sorted(name for name, spec in MODELS.items() if fnmatchcase(name, pattern) and (spec.weights or not pretrained))


def list_pretrained() -> list[str]:
    """Return the names of networks with published weights, sorted. `load_model` accepts them."""
    return list_models(pretrained=True)


def model_info(name: str) -> ModelSpec:
    """Return the record of a network. Printing it shows all fields.

    Raises:
        ValueError: There is no such network.
    """
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"There is no model {name!r}.{did_you_mean(name, MODELS)} All: {', '.join(list_models())}.")
    return MODELS[name]


def feature_info(model: str | nn.Module, **options: Any) -> dict[str, Feature]:
    """Return channels and stride of each map that a network's `features` returns, without tracing it.

    Args:
        model: Name of a network, or a network.
        **options: Options of `create_model`, if `model` is a name.

    Returns:
        `{"layer1": Feature(channels=256, stride=4), ...}`. The map of an h×w image has height h / stride, rounded up or down.

    Raises:
        ValueError: There is no such network or option, or the module does not know its channels.
    """
    if isinstance(model, str):
        model = create_model(model, **options)
    elif options:
        raise ValueError(f"{', '.join(options)}: a module already has its options. Give the network's name to set them.")
    describe = getattr(model, "feature_info", None)
    if describe is None:
        raise ValueError(f"{type(model).__name__} has no method feature_info; trace its maps with jax.eval_shape.")
    return describe()


def create_model(name: str, **options: Any) -> Network:
    """Return a network by its name.

    Args:
        name: One of `list_models()`.
        **options: See `model_info(name).options` for the options and their meaning. All networks have `num_classes`,
            `in_channels`, `dtype`, `param_dtype`, `kernel_init`, `axis_name`, `dropout`, `frozen` and `rematerialise`; residual
            networks have `drop_path` and `output_stride`, and networks of ScConv `alpha` and `variant`.

    Returns:
        A Flax module: `model.init(key, images, train=False)`, `model.apply(variables, images, train=False)`.

    Raises:
        ValueError: There is no such network or option, or an option has an impossible value.
    """
    spec = model_info(name)
    for option in ("pretrained", "weights"):  # of other libraries: without weights, as here
        if options.get(option, True) in (False, None):
            del options[option]
    for option in options:
        if option not in spec.options:
            advice = _advice(name, option, options)
            hint = f" {advice}" if advice else did_you_mean(option, spec.options)
            raise ValueError(f"Model {name!r} has no option {option!r}.{hint} Its options: {', '.join(spec.options)}.")
    return spec.build(**options)


def prepare_images(images: OneImage | Iterable[OneImage], model: str | Preparation, *, exif: bool = False) -> np.ndarray:
    """Return the float batch that a network expects for images of any size.

    The images are resized, cropped and normalised like torchvision's test images, and equal the trainer's test images bit for
    bit. Needs Pillow: `pip install 'scconv-jax[images]'`.

    Args:
        images: One image or several: paths, bytes of image files, PIL images, or uint8 RGB arrays (h, w, 3). An array
            (n, h, w, 3) is n images.
        model: Name of the network, or the preparation of its images.
        exif: Whether to rotate files and PIL images by their EXIF orientation. PyTorch's `ImageFolder` does not.

    Returns:
        float32 (n, size, size, 3), where n is 1 for a single image.

    Raises:
        ImageError: An image cannot be decoded; the message names its path or position. It is a ValueError of
            `scconv_jax.images`.
        OSError: A file cannot be opened.
        TypeError: An image has another type, such as an array of floats.
        ValueError: There is no such network, there is no image, or an array has another shape.
        ModuleNotFoundError: Pillow is not installed.
    """
    return prepare(images, model if isinstance(model, Preparation) else model_info(model).preparation, exif=exif)


def _advice(name: str, option: str, options: Mapping[str, Any]) -> str:
    """Return the advice for an option of another library, or an empty string."""
    if option == "drop_path" or ADVICE.get(option) == "Use drop_path.":
        return ADVICE.get(option, "") if "drop_path" in MODELS[name].options else _NO_DROP_PATH
    if option != "pretrained":
        fields = {field.name for field in dataclasses.fields(MODELS[name].build())}
        others = [other for other, spec in MODELS.items() if option in spec.options]
        if others:
            return f"Networks that have it: {', '.join(nearest(name, others, cutoff=0))}."
        return ADVICE.get(option) or (_BUILD if option in fields else "")
    call = ", ".join(
        [repr(name) if name in PUBLISHED else "SOURCE"]
        + [f"{key}={value!r:.60}" for key, value in options.items() if key in MODELS[name].options]
    )
    load = f"Flax keeps weights outside of the network; model, variables = scconv_jax.load_model({call}) returns both"
    if name in PUBLISHED:
        return f"{load}, with the published weights."
    return f"{load}, from a file of your own: only {', '.join(list_pretrained())} have published weights."
