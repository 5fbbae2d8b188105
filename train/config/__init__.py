"""The experiment. Config files import `Config` and its groups of fields from here, and nothing else."""

from train.config.fields import CheckpointError, ConfigError, DivergedError
from train.config.schema import Augment, Config, Data, Hosts, Log, Model, Optim, Plan, make_plan

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
