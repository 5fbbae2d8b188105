"""The state before the first step: random or with weights from a file, at step 0 or at a later epoch."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import scconv_jax
from train.config import Config, ConfigError, Model, Plan
from train.optim import at_step
from train.parallel import run_once
from train.step import TrainState, init_state

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class InitialState:
    """Creates the initial state of a run, its shapes and a placeholder."""

    config: Config
    plan: Plan
    model: nn.Module
    optimizer: optax.GradientTransformation
    image_shape: tuple[int, int, int]

    def shapes(self) -> TrainState:
        """Return the shapes and dtypes of a state."""
        return jax.eval_shape(self._random)

    def placeholder(self) -> TrainState:
        """Return a state with arbitrary values, for hosts that wait for the state of host 0."""
        return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), self.shapes())

    def create(self) -> tuple[TrainState, list[str]]:
        """Return the state that the run begins with, and notes for the user."""
        state, notes = run_once(self._random), []
        if self.config.model.init:
            drawn = {"params": state.params, "batch_stats": state.batch_stats}
            variables, notes = initial_weights(self.config.model, drawn)
            state = state.replace(**variables, ema=state.ema and variables)
        if step := jnp.int32(self.plan.first_step):
            state = state.replace(step=step, opt_state=at_step(state.opt_state, step))
        return state, notes

    def _random(self) -> TrainState:
        state = init_state(self.model, self.optimizer, self.image_shape, self.config.seed, ema=self.config.optim.ema > 0)
        if self.config.model.dtype != "float64":
            return state
        return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def check_initial_weights(config: Config) -> None:
    """Download and read the weights of `model.init`, for any number of classes: a mistake in them is found before slow work."""
    if config.data.dir and not Path(config.data.dir).expanduser().is_dir():
        return  # an error that comes next
    try:
        channels = config.data.channels
        model = scconv_jax.create_model(config.model.name, in_channels=channels)
        images = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, channels), jnp.float32)
        shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    except ValueError:
        return  # likewise
    # Zeros that take no memory: parameters that init_ignore leaves out keep them.
    initial_weights(config.model, jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes))


def initial_weights(model: Model, like: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Load the initial weights that a config names, in the structure of `like`, and return notes for the user.

    If the number of classes differs, the head keeps the values of `like`.
    """
    source, name = model.init, model.name
    if source == PRETRAINED and name not in scconv_jax.list_pretrained():
        published = ", ".join(scconv_jax.list_pretrained())
        raise ConfigError(f"no weights were published for {name}, only for {published}. Give a file instead: --init FILE")
    try:
        rename = list(zip(model.init_rename[::2], model.init_rename[1::2], strict=True))
        found = name if source == PRETRAINED else source
        variables, notes = scconv_jax.load_weights(found, like, key=model.init_key, rename=rename, ignore=model.init_ignore)
    except (scconv_jax.WeightsError, scconv_jax.ConversionError) as error:
        raise ConfigError(f"model.init {source!r}: {_with_flags(_in_one_line(error, model))}") from error
    found = f"the published weights of {name}" if source == PRETRAINED else source
    return variables, [f"Starting from {found}.", *map(_with_flags, notes)]


def _with_flags(text: str) -> str:
    """Return a message of the library with the flag's name here."""
    return text.replace("--key", "--model.init-key")


def _in_one_line(error: Exception, model: Model) -> str:
    """Return the error as one line. For weights of another network, name that network instead of hundreds of differences."""
    if "\n" in str(error):
        try:
            scconv_jax.load_model(model.init, model.name, key=model.init_key)
        except ValueError as other:
            error = other
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip('.')}: {lines[1]} {lines[2]} and so on"
