"""The state before the first step: drawn at random, or with weights from a file; at the beginning, or at a later epoch."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import scconv_jax
from train.config import Config, ConfigError, Plan
from train.parallel import run_once
from train.step import TrainState, init_state

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Start:
    """Makes states of a run: the first, and the shapes of all."""

    config: Config
    plan: Plan
    model: nn.Module
    optimizer: optax.GradientTransformation
    image_shape: tuple[int, int, int]

    def shapes(self) -> TrainState:
        """A state without values."""
        return jax.eval_shape(self._random)

    def empty(self) -> TrainState:
        """A state of any values: what a host has before it receives the state of host 0."""
        return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), self.shapes())

    def first(self) -> tuple[TrainState, list[str]]:
        """The state that the run begins with, and what to tell the user of it.

        Raises:
            ConfigError: `model.init` cannot be had, or is of another network.
        """
        state, notes = run_once(self._random), []
        if source := self.config.model.init:
            drawn = {"params": state.params, "batch_stats": state.batch_stats}
            variables, notes = initial_weights(source, self.config.model.name, drawn)
            state = state.replace(**variables, ema=state.ema and variables)
        if step := jnp.int32(self.plan.first_step):
            state = state.replace(step=step, opt_state=optax.tree_utils.tree_set(state.opt_state, count=step))
        return state, notes

    def _random(self) -> TrainState:
        state = init_state(self.model, self.optimizer, self.image_shape, self.config.seed, ema=self.config.optim.ema > 0)
        if self.config.model.dtype != "float64":
            return state
        return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def initial_weights(source: str, name: str, like: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Variables from `source` in the place of `like`, those of the network called `name`, and what to tell the user.

    A head of another number of classes keeps the values of `like`.

    Raises:
        ConfigError: the source cannot be had, or is of another network.
    """
    if source == PRETRAINED and name not in scconv_jax.list_pretrained():
        there = ", ".join(scconv_jax.list_pretrained())
        raise ConfigError(f"no weights were published for {name}, only for {there}; those of a file: --init FILE")
    try:
        variables, notes = scconv_jax.load_weights(name if source == PRETRAINED else source, like)
    except (scconv_jax.WeightsError, scconv_jax.ConversionError) as error:
        raise ConfigError(f"model.init {source!r}: {_in_one_line(error, source, name)}") from error
    found = f"the published weights of {name}" if source == PRETRAINED else source
    return variables, [f"Beginning with {found}.", *notes]


def _in_one_line(error: Exception, source: str, name: str) -> str:
    """What is wrong; of a file for another network, which it is rather than each of hundreds of entries."""
    if isinstance(error, scconv_jax.ConversionError):
        try:
            scconv_jax.load_model(source, name)
        except ValueError as other:
            error = other
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip('.')}: {lines[1]} {lines[2]} and so on"
