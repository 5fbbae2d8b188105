"""Checkpoints of our training runs, which Orbax wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scconv_jax.weights.files import WeightsError

COLLECTIONS = ("params", "batch_stats")
PREFIXES = ("params/", "batch_stats/")


class Run(NamedTuple):
    """What a checkpoint of a run holds."""

    variables: dict[str, Any]
    """`{"params": ..., "batch_stats": ...}`, NumPy arrays at the leaves; of the moving average, if there is one."""
    metadata: dict[str, str]
    """`step`, and as far as the run tells, `model` and `arguments` (JSON)."""
    skipped: dict[str, str]
    """What the checkpoint holds beside, name to kind."""
    bytes: int


def read(path: Path) -> Run:
    """Read the variables of a run's folder (its best step, else its latest), of `checkpoints/STEP`, or of its item `state`.

    Raises:
        WeightsError: the folder is no run, its checkpoint is damaged, or Orbax is not installed.
    """
    try:
        import jax
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise WeightsError("a run's checkpoints are read by Orbax: pip install 'scconv-jax[train]'") from error
    state = _state_folder(path).resolve()
    try:
        handler: Any = ocp.PyTreeCheckpointHandler()
        saved = handler.metadata(state).tree
        # A moving average is what the run was tested by, where it kept one.
        averaged = isinstance(saved.get("ema"), Mapping) and "params" in saved["ema"]
        kept = saved["ema"] if averaged else saved
        item: dict[str, Any] = {name: kept[name] for name in COLLECTIONS if name in kept}
        item = {"ema": item} if averaged else item
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = handler.restore(state, args=ocp.args.PyTreeRestore(item, as_numpy, partial_restore=True))
        variables = restored["ema"] if averaged else restored
    except Exception as error:  # whatever Orbax and its storage make of damaged files
        raise WeightsError(f"its checkpoint {state.parent.name} is damaged ({type(error).__name__}: {error!s:.200})") from error
    if "params" not in variables:
        raise WeightsError(f"its checkpoint {state.parent.name} has no params, but {', '.join(sorted(saved)) or 'nothing'}")
    return Run(
        variables,
        _metadata(state, variables),
        {name: type(value).__name__ for name, value in saved.items() if name not in item},
        sum(file.stat().st_size for file in state.rglob("*") if file.is_file()),
    )


def _state_folder(path: Path) -> Path:
    """The item `state` of a step: of the one given, else of the run's best, else of its latest."""
    if (path / "manifest.ocdbt").exists() or (path / "_METADATA").exists():
        return path
    if (path / "state").is_dir():
        return path / "state"
    steps = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [step for step in steps.iterdir() if step.name.isdecimal() and (step / "state").is_dir()]
    if not found:
        raise WeightsError("the folder is no training run: it has no checkpoints/STEP/state")

    def goodness(step: Path) -> tuple[float, int]:
        try:
            top1 = float(json.loads((step / "metrics" / "metrics").read_text())["eval/top1"])
        except (OSError, ValueError, KeyError, TypeError):
            top1 = -1.0  # not tested
        return top1, int(step.name)

    return max(found, key=goodness) / "state"


def _metadata(state: Path, variables: dict[str, Any]) -> dict[str, str]:
    """The network's name from the run's config.json, and its number of classes, as far as they can be told."""
    metadata = {"step": state.parent.name}
    try:
        metadata["model"] = str(json.loads((state.parents[2] / "config.json").read_text())["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return metadata
    heads = [module["kernel"] for module in variables["params"].values() if "kernel" in module]
    classes = [kernel.shape[1] for kernel in heads if kernel.ndim == 2]
    if len(classes) == 1:
        metadata["arguments"] = json.dumps({"num_classes": int(classes[0])})
    return metadata
