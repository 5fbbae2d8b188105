"""Metrics for TensorBoard and Weights & Biases, beside `metrics.jsonl`."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import ConfigError, Log


class Tracker(Protocol):
    """Receives the lines of `metrics.jsonl`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


def check_trackers(log: Log) -> None:
    """Check that the packages of the config's trackers are installed.

    Raises:
        ModuleNotFoundError: A package is missing; the message names the extra to install.
    """
    wanted = {"tensorboardX": (log.tensorboard, "log.tensorboard"), "wandb": (log.wandb, "log.wandb")}
    for package, (asked, field) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            extra = package.removesuffix("X")
            raise ModuleNotFoundError(f"{field} needs {package}: pip install 'scconv-jax[{extra}]', or pip install {package}")


def open_trackers(log: Log, workdir: Path, first_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers of the config. `config` is shown with the run; `first_step` is the step that a run resumes from."""
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(TensorBoard(workdir / "tensorboard", first_step))
    if log.wandb:
        trackers.append(WeightsAndBiases(workdir, log.wandb_project, config))
    return trackers


class TensorBoard:
    """Event files in `folder`. Events of steps that a resumed run repeats are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the name of the workdir. The workdir holds its id, so that a resumed run continues it."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        """Start or continue the run.

        Raises:
            ConfigError: Weights & Biases refuses, for example because nobody is logged in.
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
        self._run.define_metric("*", step_metric="step")  # a resumed run may repeat steps, which its own counter does not know

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send the remaining values and finish the run."""
        self._run.finish()
