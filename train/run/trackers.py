"""Sends metrics to TensorBoard and Weights & Biases, in addition to `metrics.jsonl`."""

import importlib.util
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.config import ConfigError, Log


class Tracker(NamedTuple):
    """Receives the lines of `metrics.jsonl`."""

    write: Callable[[int, Mapping[str, float]], object]
    """(step, values) → None."""
    close: Callable[[], object]


def check_trackers(log: Log) -> None:
    """Check that the packages of the config's trackers are installed."""
    wanted = {"tensorboardX": (log.tensorboard, "log.tensorboard"), "wandb": (log.wandb, "log.wandb")}
    for package, (asked, field) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            extra = package.removesuffix("X")
            raise ModuleNotFoundError(f"{field} needs {package}: pip install 'scconv-jax[{extra}]', or pip install {package}")


def open_trackers(log: Log, workdir: Path, first_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers of the config. `config` is shown with the run; a resumed run starts after `first_step`."""
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(_tensorboard(workdir / "tensorboard", first_step))
    if log.wandb:
        trackers.append(_weights_and_biases(workdir, log.wandb_project, config))
    return trackers


def _tensorboard(folder: Path, first_step: int) -> Tracker:
    """Write event files to `folder`. Events of steps that a resumed run repeats are purged."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(write, writer.close)


def _weights_and_biases(workdir: Path, project: str, config: Mapping[str, Any]) -> Tracker:
    """Start a run of Weights & Biases with the name of the workdir, or continue the run with the id in the workdir."""
    import wandb

    name = workdir / "wandb" / "run-id"
    if not name.exists():
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=project,
            name=workdir.name,
            id=name.read_text(),
            resume="allow",
            dir=workdir,
            config=dict(config),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"Weights & Biases: {first}; WANDB_MODE=offline keeps the metrics in the workdir") from error
    run.define_metric("*", step_metric="step")  # a resumed run repeats steps, which W&B's own counter does not allow
    return Tracker(lambda step, values: run.log({"step": step, **values}), run.finish)
