"""Metrics for others' viewers, beside `metrics.jsonl`: TensorBoard's event files, Weights & Biases."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import ConfigError, Log


class Tracker(Protocol):
    """Takes in the lines of `metrics.jsonl`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of a line, beside its step."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


def check_trackers(log: Log) -> None:
    """See to it that what the config asks for is installed.

    Raises:
        ModuleNotFoundError: it is not; the extra to install is named.
    """
    wanted = {"tensorboardX": (log.tensorboard, "log.tensorboard"), "wandb": (log.wandb, "log.wandb")}
    for package, (asked, field) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            extra = package.removesuffix("X")
            raise ModuleNotFoundError(f"{field} needs {package}: pip install 'scconv-jax[{extra}]', or pip install {package}")


def open_trackers(log: Log, workdir: Path, first_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that the config asks for; `config` is what is shown of the run, `first_step` the step it goes on from."""
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(TensorBoard(workdir / "tensorboard", first_step))
    if log.wandb:
        trackers.append(WeightsAndBiases(workdir, log.wandb_project, config))
    return trackers


class TensorBoard:
    """Event files in `folder`; those of steps that a resumed run does again are marked as void."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run named as the workdir, which holds its files and its id: resumed, it is the same run."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it.

        Raises:
            ConfigError: it refuses, say for want of a login.
        """
        import wandb

        name = workdir / "wandb" / "run-id"
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
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
        self._run.define_metric("*", step_metric="step")  # a resumed run may do steps again: its own count is not ours

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a line."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
