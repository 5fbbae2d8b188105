"""Layout of a training run's folder, and reading its checkpoints. Public as `scconv_jax.runs`.

    WORKDIR/config.json                         the run's config; `model.name` names the network
    WORKDIR/checkpoints/STEP/state              the training state, an Orbax PyTree: `params`, `batch_stats`, perhaps `ema`, ...
    WORKDIR/checkpoints/STEP/metrics/metrics    JSON with `eval/top1`, if the step was tested

An argument called `folder` is `WORKDIR` or `WORKDIR/checkpoints`. Only `restore` and `read` need Orbax (the extra `train`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from scconv_jax.weights.files import WeightsError

COLLECTIONS = ("params", "batch_stats")
PREFIXES = tuple(f"{collection}/" for collection in COLLECTIONS)
_INCOMPLETE = (
    "Orbax did not complete it, as in folders whose path has [ ] * or ?; `python -m train.main --resume RUN` completes such "
    "checkpoints, where it can"
)


def steps(folder: Path) -> list[int]:
    """Return the steps with a checkpoint, ascending; an empty list if there is no such folder."""
    folder = _checkpoints(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())  # other names: unfinished writes


def latest_step(folder: Path) -> int | None:
    """Return the last step with a checkpoint, or None."""
    return max(steps(folder), default=None)


def best_step(folder: Path) -> int | None:
    """Return the step with the highest `eval/top1`, the latest if several are equal. None if no step was tested."""
    tested = [(top1, step) for step in steps(folder) if (top1 := eval_top1(folder, step)) is not None]
    return max(tested)[1] if tested else None


def describe_choice(folder: Path) -> str:
    """Return a sentence about the step that `read` takes of a run; empty if the best step is the latest or no step was tested."""
    best, latest = best_step(folder), latest_step(folder)
    if best in (None, latest):
        return ""
    return f"The best checkpoint, of step {best}, was taken. The latest is {_checkpoints(folder) / str(latest)}."


def eval_top1(folder: Path, step: int) -> float | None:
    """Return the `eval/top1` of a step; None if the step was not tested or its metrics cannot be read."""
    try:
        return float(json.loads((_checkpoints(folder) / str(step) / "metrics" / "metrics").read_text())["eval/top1"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def restore(state: Path, like: Any, *, partial: bool = False) -> Any:
    """Return the arrays of one `checkpoints/STEP/state` as NumPy arrays.

    No other process takes part, so one host of a distributed run may call it alone.

    Args:
        state: The folder `state` of a step.
        like: A tree with the saved structure; its leaves are not read.
        partial: Allow `like` to lack some of the saved arrays.

    Raises:
        Exception: Files are damaged; Orbax and its storage raise many types.
    """
    import jax
    import orbax.checkpoint as ocp

    if not _is_complete(state):
        raise WeightsError(_INCOMPLETE)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    return _handler().restore(state.resolve(), args=ocp.args.PyTreeRestore(like, as_numpy, partial_restore=partial))


def shapes(state: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of one `checkpoints/STEP/state` by name (`params/fc/bias`)."""
    import jax

    leaves = jax.tree.leaves_with_path(_handler().metadata(state.resolve()).tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def complete(state: Path) -> bool:
    """Merge what each process wrote of one `checkpoints/STEP/state`, if Orbax left that out, and return whether it did.

    No file is changed, some are added. Orbax leaves it out, without an error, in folders whose absolute path has a pattern
    character: `[`, `]`, `*` or `?`.
    """
    if _is_complete(state):
        return False
    import asyncio

    import orbax.checkpoint as ocp

    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
    # The folder as a `Path`, which has no patterns except in the argument of `glob`.
    asyncio.run(ocp.type_handlers.merge_ocdbt_per_process_files(cast("Any", state), context, use_zarr3=False))
    return True


def read(path: Path, key: str = "") -> tuple[dict[str, Any], dict[str, str], dict[str, str], int]:
    """Read a checkpoint. For a run's folder, read the best step, or the latest if no step was tested.

    Returns:
        The variables as NumPy arrays (from the moving average, if the run has one, unless `key` is "params"); metadata: `step`
        and, if the config gives them, `model` and `arguments` (JSON); the other items of the training state, name to type; the
        size in bytes.
    """
    state = _state_folder(path)
    if not _is_complete(state):
        raise WeightsError(f"its checkpoint {state.parent.name} cannot be read: {_INCOMPLETE}")
    try:
        handler = _handler()
    except ImportError as error:
        raise WeightsError("Orbax is needed to read a run's checkpoints: pip install 'scconv-jax[train]'") from error
    try:
        saved = handler.metadata(state).tree
        averaged = isinstance(saved.get("ema"), Mapping) and "params" in saved["ema"]  # the run was tested with its average
        if key not in ("", "params", "ema" if averaged else "params"):
            raise WeightsError(f"it has no weights under the key {key!r}, but params{' and ema' if averaged else ''}")
        averaged = averaged and key != "params"
        kept = saved["ema"] if averaged else saved
        like: dict[str, Any] = {name: kept[name] for name in COLLECTIONS if name in kept}
        like = {"ema": like} if averaged else like
        restored = restore(state, like, partial=True)
        variables = restored["ema"] if averaged else restored
    except WeightsError:
        raise
    except Exception as error:  # Orbax and its storage raise many types for damaged files
        raise WeightsError(f"its checkpoint {state.parent.name} is damaged ({type(error).__name__}: {error!s:.200})") from error
    if "params" not in variables:
        raise WeightsError(f"its checkpoint {state.parent.name} has no params, but {', '.join(sorted(saved)) or 'nothing'}")
    skipped = {name: type(value).__name__ for name, value in saved.items() if name not in like}
    size = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
    return variables, _metadata(state, variables), skipped, size


def _checkpoints(folder: Path) -> Path:
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def _is_complete(state: Path) -> bool:
    return (state / "manifest.ocdbt").exists() or not any(state.glob("ocdbt.process_*"))


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(multiprocessing_options=this_process_alone())


def this_process_alone() -> Any:
    """Return Orbax's options for work in which the other hosts take no part; by default Orbax waits for them."""
    import jax
    import orbax.checkpoint as ocp

    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(process, active_processes={process})


def _state_folder(path: Path) -> Path:
    """Return the `state` folder of the given step. For a run's folder, take the best step, or the latest if none was tested."""
    if (path / "manifest.ocdbt").exists() or (path / "_METADATA").exists():
        return path.resolve()
    if (path / "state").is_dir():
        return (path / "state").resolve()
    step = best_step(path)
    step = latest_step(path) if step is None else step
    state = _checkpoints(path) / str(step) / "state"
    if not state.is_dir():
        raise WeightsError(
            f"the folder is not a training run: it has no checkpoints/{'STEP' if step is None else step}/state. Nor has it a "
            "file of weights, such as model.safetensors"
        )
    return state.resolve()


def _metadata(state: Path, variables: dict[str, Any]) -> dict[str, str]:
    """Return the step and, if known, the network's name from the run's config.json and its number of classes."""
    metadata = {"step": state.parent.name}
    try:
        metadata["model"] = str(json.loads((state.parents[2] / "config.json").read_bytes())["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return metadata
    kernels = [module["kernel"] for module in variables["params"].values() if "kernel" in module]
    classes = [kernel.shape[1] for kernel in kernels if kernel.ndim == 2]
    if len(classes) == 1:
        metadata["arguments"] = json.dumps({"num_classes": int(classes[0])})
    return metadata
