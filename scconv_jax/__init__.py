"""Self-calibrated convolutions (SC-Conv, CVPR 2020) and reconstruction convolutions (ScConv, CVPR 2023) for JAX and Flax.

    model = scconv_jax.create_model("scnet50")
    variables = model.init(jax.random.key(0), images, train=False)     images: float (n, h, w, 3)
    logits = model.apply(variables, images, train=False)

Folders:

    functional/   the operators as pure functions of arrays, and the form in which each convolution is computed
    layers/       Flax modules that replace a convolution: SelfCalibratedConv, SelfCalibration, ScConv, SRU, CRU, GhostConv
    models/       networks by name: create_model, list_models, model_info, feature_info
    weights/      reading, writing and downloading files of weights
    interop/      PyTorch's keys and layouts: from_torch, to_torch, load_model, load_weights, save, load
    fusion/       fuse: the inference form of networks and layers
    inference/    trained networks in use: load_run, predict, export, to_onnx, inference_options
    explanation/  what a network looks at: Grad-CAM, gates, receptive fields, the maps and weights of SRU and CRU
    cli/          the commands of `python -m scconv_jax`
    images.py     image files to a network's input
    finetuning.py another head, frozen parameters: reset_classifier, frozen_mask
    reports.py    parameters and multiply-adds part by part, the papers' tables: summary, count_parameters
    bridge.py     networks with their weights in NNX: to_nnx, from_nnx (nnx_module.py is what they make)

`scconv_jax.runs`, the folder of a training run, is `weights/runs.py`.
"""

from scconv_jax import explanation, files, functional, images, layers, messages, models
from scconv_jax.bridge import from_nnx, to_nnx
from scconv_jax.finetuning import frozen_mask, reset_classifier
from scconv_jax.fusion.fuse import fuse
from scconv_jax.inference.export import Exported, export
from scconv_jax.inference.imagenet import imagenet_name
from scconv_jax.inference.onnx_conversion import ExportError, to_onnx
from scconv_jax.inference.options import inference_options
from scconv_jax.inference.predict import predict
from scconv_jax.inference.run import TrainedModel, load_run
from scconv_jax.interop.conversion import ConversionError, from_torch, to_torch
from scconv_jax.interop.loading import load_model, load_weights
from scconv_jax.interop.variables import load, save
from scconv_jax.layers.ghost import GhostConv
from scconv_jax.layers.reconstruction import CRU, SRU, ScConv
from scconv_jax.layers.self_calibrated import SelfCalibratedConv, SelfCalibration
from scconv_jax.models.complexity import Part, multiply_adds
from scconv_jax.models.registry import (
    create_model,
    feature_info,
    list_models,
    list_pretrained,
    model_info,
    prepare_images,
)
from scconv_jax.programs import keep_programs
from scconv_jax.reports import Summary, count_parameters, summary
from scconv_jax.weights import WeightsError, runs

__version__ = "0.2.0"

__all__ = [
    "CRU",
    "SRU",
    "ConversionError",
    "ExportError",
    "Exported",
    "GhostConv",
    "Part",
    "ScConv",
    "SelfCalibratedConv",
    "SelfCalibration",
    "Summary",
    "TrainedModel",
    "WeightsError",
    "count_parameters",
    "create_model",
    "explanation",
    "export",
    "feature_info",
    "files",
    "from_nnx",
    "from_torch",
    "frozen_mask",
    "functional",
    "fuse",
    "imagenet_name",
    "images",
    "inference_options",
    "keep_programs",
    "layers",
    "list_models",
    "list_pretrained",
    "load",
    "load_model",
    "load_run",
    "load_weights",
    "messages",
    "model_info",
    "models",
    "multiply_adds",
    "predict",
    "prepare_images",
    "reset_classifier",
    "runs",
    "save",
    "summary",
    "to_nnx",
    "to_onnx",
    "to_torch",
]


def __getattr__(name: str) -> object:
    if name == "SCConv":
        raise AttributeError(
            "Two papers share the name SCConv. scconv_jax.SelfCalibratedConv is the one of 2020 (self-calibrated convolutions; "
            "its calibrated branch, the class SCConv of the reference code, is scconv_jax.SelfCalibration); "
            "scconv_jax.ScConv is the one of 2023 (spatial and channel reconstruction)."
        )
    hint = "" if name.startswith("_") else messages.did_you_mean(name, __all__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
