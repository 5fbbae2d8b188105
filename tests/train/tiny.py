"""A network that compiles in a second, and the command line that trains it whatever the network's name.

`python -m tests.train.tiny ARGUMENTS` is `python -m train.main ARGUMENTS` with this network.
"""

import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp

import scconv_jax
from scconv_jax.layers.core import BatchNorm, Conv
from scconv_jax.models import Network
from train.run.checkpoints import Checkpoints

_create_model = scconv_jax.create_model


class Tiny(Network, kw_only=True):
    """Convolution, BatchNorm, ReLU, mean, linear: `(n, h, w, 3)` to logits `(n, num_classes)`."""

    num_classes: int = 10
    drop_path: float = 0.0

    def setup(self) -> None:
        self.conv = Conv(8, 3, strides=2, padding=1, dtype=self.dtype)
        self.bn = BatchNorm(dtype=self.dtype, axis_name=self.axis_name)
        self.fc = nn.Dense(self.num_classes, dtype=self.dtype)
        self.leave_out = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))
        self.drop = nn.Dropout(self.dropout)

    @nn.nowrap
    def stages(self) -> dict[str, tuple[str, ...]]:
        return {"stem": ("conv", "bn"), "head": ("fc",)}

    def maps(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        x = nn.relu(self.bn(self.conv(images, train=train), train=train))
        return {"layer1": self.leave_out(x, deterministic=not train)}


def create_tiny(name: str, **options: Any) -> Tiny:
    """`create_model`, but for the size: the name is still checked."""
    _create_model(name)
    return Tiny(**options)


def work_with_tiny(tmp_path: Path, monkeypatch: Any, config: str) -> str:
    """Enter an empty folder with the config `small.py`, and let the trainer create `Tiny`. Returns the config's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scconv_jax, "create_model", create_tiny)
    Path("small.py").write_text(config)
    return "small.py"


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
