"""`export`: a trained network as a file that other programs run, or as a folder for others to load.

    format       written             what runs it
    onnx         FILE.onnx           ONNX Runtime, also in browsers, and what else reads ONNX (opset 18)
    stablehlo    FILE.stablehlo      `jax.export.deserialize(data).call(images)`; FILE.stablehlo.json describes it
    hub          a folder            `scconv_jax.load_run` and `load_model`; the form of the Hugging Face hub

Every file is loaded by the program that runs it and compared with the network before it gets its name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from scconv_jax.files import local_path
from scconv_jax.functional.checks import check_choice
from scconv_jax.fusion.fuse import fuse as fused_form
from scconv_jax.fusion.fuse import is_fused
from scconv_jax.inference import hub_folder
from scconv_jax.inference.export_check import DYNAMIC, Comparison, compare, image_sizes, on_cpu
from scconv_jax.inference.onnx_conversion import OPSET, ExportError, to_onnx
from scconv_jax.inference.run import TrainedModel, load_run
from scconv_jax.weights.files import check_writable, replacing

SUFFIXES = {"onnx": ".onnx", "stablehlo": ".stablehlo", "hub": ""}
_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",), "hub": ()}
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Exported:
    """The record of an export: the file and its check.

    Attributes:
        path: The file or folder.
        format: "onnx", "stablehlo" or "hub".
        images: Shape of the input. An open size is a text, such as `n` or `32*h`.
        logits: Shape of the output.
        details: The opset of an ONNX file, the platforms of a StableHLO file, the files of a folder.
        comparison: Largest difference from the network's logits on random images. None for a folder, whose weights equal the
            network's bit for bit.
        size: Size in bytes.
    """

    path: Path
    format: str
    images: Shape
    logits: Shape
    details: str
    comparison: Comparison | None
    size: int


def export(
    source: str | os.PathLike[str] | TrainedModel,
    out: str | os.PathLike[str],
    format: str | None = None,
    *,
    fuse: bool = True,
    batch: int | Literal["dynamic"] = DYNAMIC,
    size: tuple[int, int] | Literal["dynamic"] | None = None,
    channels_first: bool = False,
    platforms: Sequence[str] = PLATFORMS,
    tolerance: float = TOLERANCE,
    checkpoint: str | int = "best",
    force: bool = False,
) -> Exported:
    """Write a trained network as an ONNX or StableHLO file, or as a folder in the form of the Hugging Face hub.

    The network computes in float32. The names of its classes and the preparation of its images go along: in `metadata_props` of
    an ONNX file, in FILE.stablehlo.json, in the folder's `config.json`.

    Args:
        source: A run's folder, a file of weights or a published name, as for `load_run`, or what `load_run` returned.
        out: The file or folder to write.
        format: "onnx", "stablehlo" or "hub". If None, the suffix of `out` tells it: .onnx, .stablehlo, or none for a folder.
        fuse: Fuse the network first (see `scconv_jax.fuse`): equal logits in fewer operations. A folder is never fused.
        batch: Number of images, or "dynamic" for any.
        size: Height and width in pixels, or "dynamic" for all multiples of the network's output stride. If None, the size of the
            test images that the network was trained for.
        channels_first: Take images (n, c, h, w), not (n, h, w, c). ONNX only.
        platforms: Platforms of a StableHLO file: cpu, which it is compared on, and any of cuda, rocm and tpu.
        tolerance: Largest accepted difference from the network's logits, relative to the largest of them. It may be larger where
            a gate of ScConv lies within rounding of its threshold, so that the network itself changes as much.
        checkpoint: As for `load_run`.
        force: Replace `out` if it exists.

    Returns:
        What was written, and the largest difference.

    Raises:
        ExportError: The options do not fit the format or the network, or the file gives other results: then nothing is written.
        WeightsError: The source cannot be read, or `out` cannot be written.
        ModuleNotFoundError: A package is not installed; the message names the extra that installs it.
    """
    path = local_path(out)
    format = _format(path, format)
    if channels_first and format != "onnx":
        raise ExportError(f"Only ONNX files can take channels first, and the format is {format}.")
    if format == "stablehlo" and "cpu" not in platforms:
        raise ExportError("The file is compared on the CPU before success is said: name cpu among the platforms.")
    if not tolerance > 0:
        raise ExportError(f"tolerance={tolerance:g} must be above 0.")
    if missing := [package for package in _PACKAGES[format] if not _is_installed(package)]:
        raise ModuleNotFoundError(f"The format {format} needs the package {missing[0]}: pip install 'scconv-jax[export]'")
    if os.path.lexists(path) and not force:
        raise ExportError(f"{path} exists. Give another name, or replace it with force (--force).")
    check_writable(path / hub_folder.FILES[0] if format == "hub" and path.is_dir() else path)
    trained = source if isinstance(source, TrainedModel) else load_run(source, checkpoint=checkpoint)
    if format == "hub":
        run = None if isinstance(source, TrainedModel) else Path(source).expanduser()
        written = hub_folder.write(path, trained, hub_folder.read_record(run, checkpoint) if run else hub_folder.RunRecord())
        side = trained.preparation.size
        images = ("n", side, side, trained.preparation.channels)
        return Exported(path, format, images, ("n", len(trained.readable_names)), ", ".join(hub_folder.FILES), None, written)
    model = cast("Any", trained.model).clone(dtype=jnp.float32, axis_name=None)
    sizes = image_sizes(trained.name, model, batch, (trained.preparation.size,) * 2 if size is None else size)
    network, variables = model, trained.variables
    if fuse and not is_fused(variables):
        # The form without Winograd's kernels, which are for XLA on CPU only.
        example = jax.ShapeDtypeStruct(sizes.samples()[0], jnp.float32)
        network, variables = fused_form(model, variables, example, platform="gpu")
    apply = functools.partial(network.apply, jax.tree.map(jnp.asarray, variables), train=False)
    images = jax.ShapeDtypeStruct(sizes.shape(), jnp.float32)
    given, logits = _plain(images.shape), _plain(jax.eval_shape(apply, images).shape)
    given = tuple(given[axis] for axis in ((0, 3, 1, 2) if channels_first else (0, 1, 2, 3)))
    about = _about(trained) | {"fused": is_fused(variables), "images": given, "logits": logits}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(path))
        if format == "onnx":
            details = f"opset {OPSET}"
            metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
            program = to_onnx(apply, images, output="logits", channels_first=channels_first, metadata=metadata)
            temporary.write_bytes(program.SerializeToString())
            run = _onnx_runtime(temporary, channels_first)
        else:
            details = f"platforms {', '.join(platforms)}"
            temporary.write_bytes(_stablehlo(apply, images, platforms))
            run = _deserialized(temporary)
            beside = stack.enter_context(replacing(path.with_name(f"{path.name}.json")))
            about |= {"platforms": list(platforms), "jax": jax.__version__}
            hub_folder.write_json(beside, about)
        comparison = compare(run, model, trained.variables, sizes, tolerance)
        written = temporary.stat().st_size
    return Exported(path, format, given, logits, details, comparison, written)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # from a hook that hides the package
        return False


def _format(path: Path, name: str | None) -> str:
    if name is not None:
        check_choice("format", name, SUFFIXES)
        return name
    for known, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return known
    raise ExportError(
        f"{path.name} does not tell the format. End it in .onnx or .stablehlo, or give a format: {', '.join(SUFFIXES)}."
    )


def _plain(shape: tuple[Any, ...]) -> Shape:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


def _about(trained: TrainedModel) -> dict[str, Any]:
    """Return the description of a network that goes along with a file."""
    from scconv_jax import __version__

    return {
        "model": trained.name,
        "arguments": dict(trained.options),
        "class_names": list(trained.readable_names),
        "preparation": asdict(trained.preparation),
        "version": __version__,
    }


def _onnx_runtime(path: Path, channels_first: bool) -> Any:
    """Return a function of images (n, h, w, c) that ONNX Runtime computes with a file."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot load the exported file: {error!s:.300}") from error
    order = (0, 3, 1, 2) if channels_first else (0, 1, 2, 3)
    return lambda images: session.run(["logits"], {"images": np.ascontiguousarray(images.transpose(order))})[0]


def _stablehlo(apply: Any, images: Any, platforms: Sequence[str]) -> bytes:
    try:
        program = jax_export.export(jax.jit(lambda images: apply(images)), platforms=list(platforms))(images)
        return bytes(program.serialize())
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ExportError(f"JAX cannot export for the platforms {', '.join(platforms)}: {error!s:.300}") from error


def _deserialized(path: Path) -> Any:
    """Return a function of images (n, h, w, c) that JAX computes with a file."""
    with on_cpu():
        program = jax_export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(program.call(images))
