"""A network that compiles in a second, and the command line with it in the place of every network of the library.

`python -m tests.train.tiny ARGUMENTS` is `python -m train.main ARGUMENTS` with this network.
"""

import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import scconv_jax
from scconv_jax.layers.core import BatchNorm, Conv
from train.run.checkpoints import Checkpoints

_create_model = scconv_jax.create_model


class Tiny(nn.Module):
    """Convolution, BatchNorm, ReLU, mean, linear: `(n, h, w, 3)` to logits `(n, num_classes)`."""

    num_classes: int = 10
    in_channels: int = 3
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = Conv(8, 3, strides=2, padding=1, dtype=self.dtype, name="conv")(images)
        x = nn.relu(BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name="bn")(x, train=train))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x.mean(axis=(1, 2)))
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


def create_tiny(name: str, **options: Any) -> Tiny:
    """`create_model`, but for the size: the name is still checked."""
    _create_model(name)
    return Tiny(**options)


def final_arrays(workdir: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the latest checkpoint of a run, by name."""
    with Checkpoints(Path(workdir), keep=1) as checkpoints, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        saved = reader.restore(checkpoints.directory / str(checkpoints.latest()) / "state")
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(saved)
    }


def final_state(workdir: str | Path) -> dict[str, bytes]:
    """Their bytes."""
    return {name: array.tobytes() for name, array in final_arrays(workdir).items()}


if __name__ == "__main__":
    from train.main import main

    scconv_jax.create_model = create_tiny
    sys.exit(main())
