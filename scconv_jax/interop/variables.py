"""`save` and `load`: Flax variables in files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util

from scconv_jax.interop.conversion import Variables, to_torch
from scconv_jax.messages import listed
from scconv_jax.models.registry import PUBLISHED
from scconv_jax.weights import WeightsError, read, runs, safetensors_files, torch_files

_log = logging.getLogger("scconv_jax")


class Loaded(NamedTuple):
    """Flax variables from a file, and the file's metadata."""

    variables: Variables
    metadata: dict[str, Any]


def load(path: str | os.PathLike[str], *, checkpoint: str | int = "best") -> Loaded:
    """Read Flax variables that `save` wrote, or those of a training run.

    Args:
        path: A `.safetensors` file with Flax keys, a run's folder, or one of its `checkpoints/STEP`.
        checkpoint: Which checkpoint of a run's folder to take: "best" (highest test accuracy; the latest if none was tested),
            "latest", or a step.

    Returns:
        `(variables, metadata)`: variables are NumPy arrays; metadata has, if the file contains them, `model` and `arguments`
        (for `create_model(metadata["model"], **metadata["arguments"])`), `class_names` (a list), `preparation` (of images, a
        dict), `source`, `source_sha256` and `version`.
        Values that are not finite are kept, and logged as a warning under `scconv_jax`.

    Raises:
        WeightsError: The file cannot be read, or has PyTorch's keys: convert it first.
    """
    if str(path) in PUBLISHED and not Path(path).exists():
        raise WeightsError(f"load reads files of variables; load_model({str(path)!r}) downloads published weights.")
    source = read(path, checkpoint=checkpoint)
    if not source.is_flax:
        raise WeightsError(
            f"{path} has PyTorch's keys and layout. Convert it (`python -m scconv_jax convert {path} --out FILE.safetensors`), "
            "or give its entries to `scconv_jax.from_torch`."
        )
    metadata: dict[str, Any] = dict(source.metadata)
    for name in ("arguments", "class_names", "preparation"):
        if name in metadata:
            with contextlib.suppress(ValueError):  # by another hand: left as the text that it is
                metadata[name] = json.loads(metadata[name])
    if source.not_finite:
        count = sum(source.not_finite.values())
        _log.warning("%s: %d values are NaN or infinite, in %s.", path, count, listed(list(source.not_finite), 3))
    return Loaded(source.variables, metadata)


def save(path: str | os.PathLike[str], variables: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write variables to a file, whole or not at all.

    Args:
        path: `.safetensors` for Flax keys and layout (`params/layer1/0/conv1/kernel`), or `.pth` or `.pt` for a PyTorch state
            dict (`layer1.0.conv1.weight`), which PyTorch loads with `weights_only=True`.
        variables: `{"params": ..., "batch_stats": ...}`, JAX or NumPy arrays.
        metadata: `model`, `arguments`, `class_names`, `preparation` and the like, stored in a `.safetensors` file only. Values
            other than strings are stored as JSON.

    Raises:
        WeightsError: The suffix is unknown, there are no variables, JSON cannot express the metadata, or writing fails.
    """
    path = Path(path)
    if "params" not in variables or not set(variables) <= set(runs.COLLECTIONS):
        raise WeightsError(
            f"Cannot write {path}: variables are {{'params': ..., 'batch_stats': ...}}, as `model.init` returns them; "
            f"got {listed(list(map(str, variables)), 5) or 'none'}."
        )
    try:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    except (TypeError, ValueError) as error:
        raise WeightsError(f"Cannot write {path}: metadata must be strings or values that JSON can express ({error}).") from error
    if path.suffix == ".safetensors":
        safetensors_files.write(path, traverse_util.flatten_dict(dict(variables), sep="/"), texts)
    elif path.suffix in (".pth", ".pt"):
        torch_files.write_zip(path, to_torch(variables))
    else:
        raise WeightsError(f"Cannot tell the format from {path.name}: its name must end in .safetensors, .pth or .pt.")
