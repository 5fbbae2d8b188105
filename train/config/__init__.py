"""What a run is made of. Config files need `from train.config import Config` and the groups of fields, and nothing else."""

from train.config.fields import ConfigError
from train.config.schema import (
    Augment,
    CheckpointError,
    Config,
    Data,
    DivergedError,
    Hosts,
    Log,
    Model,
    Optim,
    Plan,
    make_plan,
)

__all__ = [
    "Augment",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Data",
    "DivergedError",
    "Hosts",
    "Log",
    "Model",
    "Optim",
    "Plan",
    "make_plan",
]
