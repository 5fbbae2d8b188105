"""Errors that end a run with one line; `train.main.explain` maps them to exit codes."""


class ConfigError(Exception):
    """A mistake that the user can correct. Exit code 2."""


class DivergedError(Exception):
    """Devices that must hold the same state do not. Exit code 1."""


class CheckpointError(Exception):
    """A checkpoint cannot be written: no space, no permission, no disk. Exit code 1."""
