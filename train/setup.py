"""What training and testing work on (images, network, devices), the step of the one, and the whole of the other."""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import scconv_jax
from train.config import Config, ConfigError
from train.data.augment import make_augment, make_mix
from train.data.batches import Staged, eval_batches
from train.data.datasets import Dataset, load_dataset
from train.parallel import Parallel, Step, make_parallel, of_all_hosts
from train.run.metrics import RUN_AHEAD
from train.step import AXIS, TrainState, eval_step, train_step


@dataclass(frozen=True)
class Job:
    """Images, network and devices."""

    dataset: Dataset
    model: nn.Module
    normalize: Callable[[jax.Array], jax.Array]
    parallel: Parallel


def prepare(config: Config) -> Job:
    """Load the data and make the network.

    Raises:
        ConfigError: there is no such network, or it does not take such images; or another host found other images.
    """
    if config.model.dtype == "float64" and jnp.zeros(0).dtype != "float64":
        raise ConfigError("model.dtype float64 needs 64-bit numbers in JAX: set JAX_ENABLE_X64=1 in the environment")
    dataset = load_dataset(config.data)
    check_same_images(dataset)
    options = {
        "num_classes": dataset.num_classes,
        "dtype": jnp.dtype(config.model.dtype),
        "axis_name": AXIS if config.model.sync_batchnorm else None,
    }
    images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    try:
        model = scconv_jax.create_model(config.model.name, **options)
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    except ValueError as error:
        raise ConfigError(f"model.name {config.model.name!r}: {error}") from error
    normalizer = functools.partial(scconv_jax.images.normalize, mean=dataset.mean, std=dataset.std)
    return Job(dataset, model, normalizer, make_parallel(config.parallel, jax.devices()))


def check_same_images(dataset: Dataset) -> None:
    """See that all hosts, each of which reads its part of every batch, found the same classes and as many images.

    Raises:
        ConfigError: they did not, on all hosts.
    """
    crc = zlib.crc32("\0".join(dataset.classes).encode(errors="surrogateescape")) >> 1
    hosts = of_all_hosts([len(dataset.train), len(dataset.test), dataset.num_classes, crc])
    other = next((host for host, found in enumerate(hosts) if found != hosts[0]), 0)
    if other:
        there, here = (
            f"{train} training and {test} test images of {n} classes" for train, test, n, _ in (hosts[other], hosts[0])
        )
        names = ", of other names" if hosts[other][:3] == hosts[0][:3] else ""
        raise ConfigError(f"host {other} found {there}{names}, host 0 {here}: all hosts need the same images in data.dir")


def make_step(job: Job, config: Config, optimizer: optax.GradientTransformation) -> Step:
    """(state, batch) → the state after one step of training, and the metrics of that step; the state given is used up."""
    step = functools.partial(
        train_step,
        model=job.model,
        optimizer=optimizer,
        augment=make_augment(config.data, config.augment),
        normalize=job.normalize,
        label_smoothing=config.optim.label_smoothing,
        seed=config.seed,
        mix=make_mix(config.augment),
        parts=config.optim.accumulate,
        rematerialise=config.model.rematerialise,
        ema_decay=config.optim.ema,
    )
    return job.parallel.over_devices(step, donate_state=True)


def make_test(job: Job, config: Config) -> Callable[[TrainState], dict[str, float]]:
    """State → `eval/loss`, `eval/top1` and, of more than five classes, `eval/top5` over all test images, each counted once.

    `eval/images` is how many they are, without those that cannot be read.
    """
    sums_of = job.parallel.over_devices(functools.partial(eval_step, model=job.model, normalize=job.normalize))

    def test(state: TrainState) -> dict[str, float]:
        batches = eval_batches(
            job.dataset.test,
            config.data.batch_size,
            threads=config.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with Staged(batches, job.parallel.put_batch) as staged:
            sums = []
            for batch in staged:
                sums.append(sums_of(state, batch))
                jax.block_until_ready(sums[-RUN_AHEAD:][0])  # or all test images would be on the device at once
        sums = jax.device_get(sums)
        totals = {key: float(sum(batch[key] for batch in sums)) for key in sums[0]}
        count = totals.pop("count")
        if not count:
            raise ConfigError("not one image of the test set can be read")
        return {f"eval/{key}": total / count for key, total in totals.items()} | {"eval/images": int(count)}

    return test
