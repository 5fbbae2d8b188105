"""Layout of a training run's folder, and reading its checkpoints. Public as `scconv_jax.runs`.

    WORKDIR/config.json                         the run's config; `model.name` names the network
    WORKDIR/model.json                          what an answer needs: network, options, names of classes, preparation of images
    WORKDIR/checkpoints/STEP/state              the training state, an Orbax PyTree: `params`, `batch_stats`, perhaps `ema`, ...
    WORKDIR/checkpoints/STEP/metrics/metrics    JSON with `eval/top1`, if the step was tested

An argument called `folder` is `WORKDIR` or `WORKDIR/checkpoints`. Only `restore` and `read` need Orbax (the extra `train`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from scconv_jax import files
from scconv_jax.images import Preparation, resize_for
from scconv_jax.messages import listed
from scconv_jax.weights.files import WeightsError

RECORD = "model.json"
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
    tested = {step: top1 for step in steps(folder) if (top1 := eval_top1(folder, step)) is not None}
    return best_of(tested) if tested else None


def best_of(top1: Mapping[int, float]) -> int:
    """Return the step with the highest accuracy, the latest if several are equal, given the accuracy of each step."""
    return max(top1, key=lambda step: (top1[step], step))


def choose_step(folder: Path, checkpoint: str | int = "best") -> int | None:
    """Return the step of a checkpoint: "best" (the latest if no step was tested), "latest" or a step. None if there is none.

    Raises:
        WeightsError: There is no such step, or `checkpoint` is something else.
    """
    saved, latest = steps(folder), latest_step(folder)
    if checkpoint == "best":
        best = best_step(folder)
        return latest if best is None else best
    if checkpoint == "latest":
        return latest
    if not str(checkpoint).isdecimal():
        raise WeightsError(f"checkpoint {checkpoint!r} is neither best, nor latest, nor a step")
    if int(checkpoint) not in saved:
        found = f"of step {listed(list(map(str, saved)))}" if saved else "none"
        raise WeightsError(f"it has no checkpoint of step {checkpoint}, but {found}")
    return int(checkpoint)


def describe_choice(folder: Path, taken: int) -> str:
    """Return a sentence about the step that was taken of a run; empty if there was no choice or the best step is the latest."""
    best, latest = best_step(folder), latest_step(folder)
    if taken == latest and best is None and len(steps(folder)) > 1:
        return f"No checkpoint was tested; the latest, of step {taken}, was taken."
    if latest is None or (best in (None, taken) and taken == latest):
        return ""
    kind = "best " if taken == best else "latest " if taken == latest else ""
    other, step = ("latest", latest) if taken == best or best is None else ("best", best)
    return f"The {kind}checkpoint, of step {taken}, was taken. The {other} is {_checkpoints(folder) / str(step)}."


def write_record(
    folder: Path, *, model: str, arguments: Mapping[str, Any], class_names: Sequence[str], preparation: Preparation
) -> None:
    """Write `model.json` to a run's folder atomically.

    Args:
        folder: The run's folder.
        model: Name of the network.
        arguments: Its options, which JSON must be able to express.
        class_names: Name of each class, in the order of the logits.
        preparation: Preparation of the images that the network is tested on.
    """
    record = {"model": model, "arguments": dict(arguments), "class_names": list(class_names), "preparation": asdict(preparation)}
    with files.replacing(folder / RECORD) as file:
        file.write_text(json.dumps(record, indent=1) + "\n")


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
    """Merge the files of each process in one `checkpoints/STEP/state` if Orbax did not, and return whether this was so.

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


def read(path: Path, key: str = "", checkpoint: str | int = "best") -> tuple[dict[str, Any], dict[str, str], dict[str, str], int]:
    """Read a checkpoint. For a run's folder, `choose_step` says which.

    Returns:
        The variables as NumPy arrays (from the moving average, if the run has one, unless `key` is "params"); metadata: `step`
        and, if the run's folder gives them, `model`, `arguments`, `class_names` and `preparation` (JSON); the other items of the
        training state, name to type; the size in bytes.
    """
    state = _state_folder(path, checkpoint)
    if not _is_complete(state):
        raise WeightsError(f"its checkpoint {state.parent.name} cannot be read: {_INCOMPLETE}")
    try:
        handler = _handler()
    except ImportError as error:
        raise WeightsError("Orbax is needed to read a run's checkpoints: pip install 'scconv-jax[train]'") from error
    try:
        saved = handler.metadata(state.resolve()).tree
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


def _state_folder(path: Path, checkpoint: str | int) -> Path:
    """Return the `state` folder of the given step or, for a run's folder, of the step that `choose_step` returns."""
    if (path / "manifest.ocdbt").exists() or (path / "_METADATA").exists() or (path / "state").is_dir():
        if checkpoint != "best":
            raise WeightsError(f"it is one checkpoint, so there is no checkpoint {checkpoint!r} to choose; give the run's folder")
        return (path / "state" if (path / "state").is_dir() else path).absolute()
    step = choose_step(path, checkpoint)
    state = _checkpoints(path) / str(step) / "state"
    if not state.is_dir():
        raise WeightsError(
            f"the folder is not a training run: it has no checkpoints/{'STEP' if step is None else step}/state. Nor has it a "
            "file of weights, such as model.safetensors"
        )
    return state.absolute()


def _metadata(state: Path, variables: dict[str, Any]) -> dict[str, str]:
    """Return the step and what `model.json` says. In older runs, config.json, the checkpoint and the head say a part of it."""
    metadata: dict[str, Any] = {}
    run = state.parents[2]  # not resolved: `checkpoints` may be a link to another disk
    config, record, about = (_json(path) for path in (run / "config.json", run / RECORD, state.parent / "about" / "metadata"))
    with contextlib.suppress(KeyError, TypeError):
        metadata["model"] = str(config["model"]["name"])
        kernels = [module["kernel"] for module in variables["params"].values() if "kernel" in module]
        classes = [kernel.shape[1] for kernel in kernels if kernel.ndim == 2]
        if len(classes) == 1:
            metadata["arguments"] = {"num_classes": int(classes[0])}
    if names := about.get("classes"):
        metadata["class_names"] = names
    with contextlib.suppress(KeyError, TypeError, ValueError):
        metadata["preparation"] = _preparation(config["data"])
    known = {key: record[key] for key in ("model", "arguments", "class_names", "preparation") if key in record}
    texts = {key: value if key == "model" else json.dumps(value) for key, value in (metadata | known).items()}
    return texts | {"step": state.parent.name}


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is absent or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _preparation(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preparation of images in a run without `model.json`, given the `data` of its config.

    Data sets that the trainer makes itself have the mean and standard deviation of their training images, which the config does
    not say: they are then None.
    """
    size, is_file = data["image_size"], data["name"] in ("folder", "tfds")
    mean, std = data["mean"] or None, data["std"] or None
    if is_file and data.get("channels") == 1:
        mean, std = mean or [sum(Preparation.mean) / 3], std or [sum(Preparation.std) / 3]
    elif is_file:
        mean, std = mean or Preparation.mean, std or Preparation.std
    resize = data["resize"] or resize_for(size) if is_file else size
    return {"size": size, "resize": resize, "mean": mean, "std": std, "exif": data.get("exif", False)}
