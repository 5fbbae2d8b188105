"""Config files: Python in `configs/` to start a run, `config.json` in the folder of a run."""

import dataclasses
import json
import os
import runpy
import traceback
import typing
from pathlib import Path
from typing import Any, TypeVar

from train.config.fields import ConfigError, Group
from train.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT = CONFIGS / "digits.py"
IMAGENET = CONFIGS / "scnet50.py"
"""The default config for a folder of images."""

AnyGroup = TypeVar("AnyGroup", bound=Group)


def load_config(path: Path) -> Config:
    """Run a config file and return its `config`.

    Raises:
        ConfigError: The file does not exist, fails, or defines no `config = Config(...)`.
    """
    if not path.is_file():
        raise ConfigError(f"no config file {path}; there is {_nearest_files(path)}")
    if b"\0" in path.read_bytes():
        raise ConfigError(f"{path} is not text in UTF-8, perhaps in UTF-16: save it as UTF-8")
    try:
        config = runpy.run_path(str(path)).get("config")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # a config file is a program and can fail in any way
        lines = [step.lineno for step in traceback.extract_tb(error.__traceback__) if step.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path} must define `config = Config(...)`, found {type(config).__name__}")
    return config


def to_json(config: Config) -> str:
    """Return the text of `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, source: str) -> Config:
    """Return the config of an earlier run; errors call its file `source`."""
    try:
        return _from_dict(Config, json.loads(text))
    except (ConfigError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source} is not the config of a run: {error}") from error


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one: `{"optim": {"lr": 0.1}}` becomes `{"optim.lr": 0.1}`."""
    leaves = {}
    for key, value in values.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return field → (old value, new value) for every field that differs; fields are named as in "optim.lr"."""
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def override(group: AnyGroup, values: dict[str, Any], prefix: str = "") -> AnyGroup:
    """Return the config with other `values`; fields are named as in "optim.lr"."""
    changed = {}
    for field in dataclasses.fields(typing.cast("Any", group)):
        value, name = getattr(group, field.name), prefix + field.name
        changed[field.name] = override(value, values, name + ".") if isinstance(value, Group) else values.get(name, value)
    return type(group)(**changed)


def local_path(name: str | Path, field: str) -> Path:
    """Return the path of a file or folder, with `~` expanded; errors name the `field`."""
    import scconv_jax  # loads JAX, so late

    try:
        return scconv_jax.files.local_path(name)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def check_utf8(path: Path, field: str) -> None:
    """Refuse a folder whose absolute path is not UTF-8, before anything is made: Orbax and TFDS cannot name it."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{field}: the path {error.object!r} is not UTF-8; rename it, or choose another") from error


def with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute paths of its images and initial weights, so that a run resumes from any folder."""
    values, weights = {}, os.path.expanduser(config.model.init)
    if config.data.dir:
        folder = local_path(config.data.dir, "data.dir").absolute()
        values["data.dir"] = str(folder)
        if config.data.name == "tfds":
            check_utf8(folder, "data.dir")
    if config.model.init and config.model.init != "pretrained" and os.path.lexists(weights):  # else: a name, or a URL
        values["model.init"] = str(Path(weights).absolute())
    return override(config, values)


def _nearest_files(path: Path) -> str:
    """Return the config files with the names nearest to `path`, as the user would type them."""
    import scconv_jax  # loads JAX, so only after a mistake

    def typed(path: Path) -> str:
        full = path.resolve()
        return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else path)

    files = {*CONFIGS.glob("*.py"), *path.parent.glob("*.py")}
    by_stem = {file.stem: typed(file) for file in sorted(files) if file.name != "__init__.py"}
    return ", ".join(by_stem[stem] for stem in scconv_jax.messages.nearest(path.stem, by_stem) or by_stem)


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    hints, fields = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if isinstance(hint := hints.get(name), type) and issubclass(hint, Group):
            fields[name] = _from_dict(hint, value)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)
