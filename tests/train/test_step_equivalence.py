"""Steps with mixup, label smoothing, accumulation, clipping and averaged weights as PyTorch takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scconv_jax import from_torch, to_torch
from tests.reference.state import nchw
from tests.train.tiny import Tiny
from train.config import Augment, Optim
from train.data.augment import make_mix
from train.optim import make_optimizer
from train.parallel import make_parallel
from train.step import batch_key, init_state, train_step

OPTIM = Optim(lr=0.3, momentum=0.9, weight_decay=1e-2, label_smoothing=0.1, clip_norm=0.2, ema=0.15)
MIXING, SEED, STEPS, BATCH, CLASSES = Augment(mixup=0.5), 3, 4, 12, 10


class TinyOracle(torch.nn.Module):
    """The tiny network of `tests/train/tiny.py`."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = torch.nn.BatchNorm2d(8)
        self.fc = torch.nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.fc(torch.relu(self.bn(self.conv(images))).mean((2, 3)))


def normalize(images):
    return images.astype(jnp.float64) / 255 - 0.5


def batches():
    rng = np.random.default_rng(0)
    return [
        {"image": rng.integers(0, 256, (BATCH, 9, 8, 3), np.uint8), "label": rng.integers(0, CLASSES, BATCH, np.int32)}
        for _ in range(STEPS)
    ]


def kept_share(step):
    """The share of its own that an image keeps in a step: one number, for mixup."""
    return float(make_mix(MIXING)(batch_key(SEED, jnp.int32(step)), 9, 8).mean())


def train_with_pytorch(oracle, parts):
    optimiser = torch.optim.SGD(oracle.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, weight_decay=OPTIM.weight_decay)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=OPTIM.label_smoothing)

    def average(old, new, count):
        decay = min(OPTIM.ema, count / (9 + count))
        return decay * old + (1 - decay) * new

    averaged = torch.optim.swa_utils.AveragedModel(oracle, avg_fn=average, use_buffers=True)
    averaged.update_parameters(oracle)  # the first time it copies
    oracle.train()
    losses = []
    for step, batch in enumerate(batches()):
        kept, loss_of_step = kept_share(step), 0.0
        optimiser.zero_grad()
        for images, labels in zip(np.split(batch["image"], parts), np.split(batch["label"], parts), strict=True):
            images = nchw(images / 255 - 0.5)
            targets = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).double()
            neighbours = torch.arange(len(labels)) ^ 1
            images, targets = (kept * x + (1 - kept) * x[neighbours] for x in (images, targets))
            loss = criterion(oracle(images), targets) / parts
            loss.backward()
            loss_of_step += loss.item()
        # `clip_grad_norm_` itself divides by the length + 1e-6, which shows in float64.
        length = torch.nn.utils.get_total_norm([parameter.grad for parameter in oracle.parameters()])
        assert length > OPTIM.clip_norm, "nothing to clip"
        for parameter in oracle.parameters():
            parameter.grad *= OPTIM.clip_norm / length
        optimiser.step()
        averaged.update_parameters(oracle)
        losses.append(loss_of_step)
    return losses, averaged.module


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.usefixtures("x64")
def test_steps_are_those_of_pytorch(close, parts):
    torch.manual_seed(0)
    oracle = TinyOracle().double()
    model = Tiny(dtype=jnp.float64)
    optimizer = make_optimizer(OPTIM, OPTIM.lr)
    state = jax.eval_shape(lambda: init_state(model, optimizer, (9, 8, 3), 0))
    variables = from_torch(oracle.state_dict(), {"params": state.params, "batch_stats": state.batch_stats})
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        augment=lambda _, images: images,
        normalize=normalize,
        label_smoothing=OPTIM.label_smoothing,
        seed=SEED,
        mix=make_mix(MIXING),
        parts=parts,
        ema_decay=OPTIM.ema,
    )
    parallel = make_parallel("shard_map", jax.devices()[:1])
    state = init_state(model, optimizer, (9, 8, 3), 0).replace(
        **variables, opt_state=optimizer.init(variables["params"]), ema=variables
    )
    state, mapped, losses = parallel.put_state(state), parallel.over_devices(step), []
    for batch in batches():
        state, metrics = mapped(state, parallel.put_batch(batch))
        losses.append(float(metrics["loss"]))

    expected_losses, averaged = train_with_pytorch(oracle, parts)
    close(np.array(losses), np.array(expected_losses), "losses", limit=1e-11)
    for what, ours, theirs, limit in (
        ("", {"params": state.params, "batch_stats": state.batch_stats}, oracle, 1e-11),
        ("averaged ", state.ema, averaged, 1e-7),  # the decay is a quotient of int32, and float32
    ):
        found = to_torch(jax.device_get(ours))
        for name, value in theirs.state_dict().items():
            # PyTorch's running statistics follow one part after the other; ours are of the parts together, as of devices.
            if "num_batches" not in name and not (parts > 1 and "running" in name):
                close(found[name], value.numpy(), what + name, limit=limit)
