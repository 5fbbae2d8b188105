"""A training run of a small network, with random weights, for all tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import scconv_jax
from scconv_jax.images import Preparation
from train.config import Config, Optim
from train.config.files import to_json
from train.optim import make_optimizer
from train.run.checkpoints import Checkpoints
from train.step import init_state

NAMES = ("cat", "<b>dog</b>", "n01440764")
PREPARATION = Preparation(size=32, resize=35, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


def made(shapes, seed=0):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: numbers.uniform(0.5, 1, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of two steps, of which the first is the best."""
    folder = tmp_path_factory.mktemp("runs") / "pets"
    folder.mkdir()
    optimizer = make_optimizer(Optim(), optax.constant_schedule(0.1))
    model = scconv_jax.create_model("scnet20_small", num_classes=3)
    state = jax.eval_shape(lambda: init_state(model, optimizer, (32, 32, 3), seed=0))
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, top1 in ((5, 0.9), (10, 0.4)):
            checkpoints.save(made(state, step).replace(step=jnp.int32(step)), {"eval/top1": top1})
    (folder / "config.json").write_text(to_json(Config()))
    scconv_jax.runs.write_record(
        folder, model="scnet20_small", arguments={"num_classes": 3}, class_names=NAMES, preparation=PREPARATION
    )
    return folder
