"""Configs as files: Python under `configs/` to begin with, `config.json` in the folder of a run."""

import dataclasses
import difflib
import json
import runpy
import typing
from pathlib import Path
from typing import Any

from train.config import Config
from train.config.fields import ConfigError, Group

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT = CONFIGS / "digits.py"


def load_config(path: Path) -> Config:
    """Run a config file and return its `config`.

    Raises:
        ConfigError: there is no such file, it fails, or it defines no `config = Config(...)`.
    """
    if not path.is_file():
        there = [str(p) for p in sorted({*CONFIGS.glob("*.py"), *path.parent.glob("*.py")})]
        by_stem = {Path(p).stem: shown(p) for p in there if not p.endswith("__init__.py")}
        close = difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.5) or list(by_stem)
        raise ConfigError(f"no config file {path}; there is {', '.join(by_stem[stem] for stem in close)}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        line = getattr(error, "lineno", None) or _line_in(path, error)
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path} must define `config = Config(...)`, found {type(config).__name__}")
    return config


def to_json(config: Config) -> str:
    """The config as text, for `config.json` in the run's folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """The config of an earlier run; `source` names the file in an error."""
    try:
        return _from_dict(Config, json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source} is not the config of a run: {error}") from error


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Field path → (old, new) for each field in which the two differ."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves = {}
        for key, value in values.items():
            leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return leaves

    before, after = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def shown(path: str) -> str:
    """The path as a person would type it here."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return path


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)

    def value_of(name: str, value: Any) -> Any:
        if isinstance(hints.get(name), type) and issubclass(hints[name], Group):
            return _from_dict(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: value_of(name, value) for name, value in values.items()})


def _line_in(path: Path, error: BaseException) -> int | None:
    """The line of the config file at which it failed."""
    line, step = None, error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return line
