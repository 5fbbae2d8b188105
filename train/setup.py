"""Data, network and devices of a run, its compiled training step and its test."""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import scconv_jax
from train.config import Config, ConfigError
from train.data.augment import make_augment, make_mix
from train.data.batches import DevicePrefetcher, eval_batches
from train.data.datasets import Dataset, load_dataset
from train.initial_state import check_initial_weights
from train.parallel import Parallel, Step, all_gather_ints, make_parallel
from train.run.metrics import RUN_AHEAD
from train.step import AXIS, TrainState, eval_step, train_step


@dataclass(frozen=True)
class TrainingSetup:
    """Data, network and devices of a run."""

    dataset: Dataset
    model: nn.Module
    normalize: Callable[[jax.Array], jax.Array]
    parallel: Parallel
    frozen: Any = None
    """Tree of bool like the parameters: True for those that stay as they are. None: all are trained."""


def make_setup(config: Config, *, testing: bool = False, begins: bool = False) -> TrainingSetup:
    """Load the data and create the network.

    Args:
        config: The experiment.
        testing: Training images may be missing.
        begins: The run begins with the weights of `model.init`. They are checked before images are listed.
    """
    if config.model.dtype == "float64" and jnp.zeros(0).dtype != "float64":
        raise ConfigError("model.dtype float64 needs 64-bit numbers in JAX: set JAX_ENABLE_X64=1 in the environment")
    if begins and config.model.init and jax.process_index() == 0:
        check_initial_weights(config)
    dataset = load_dataset(config.data, seed=config.seed, testing=testing)
    for note in dataset.notes:
        print(note)
    check_same_images(dataset)
    dtype, axis_name = jnp.dtype(config.model.dtype), AXIS if config.model.sync_batchnorm else None
    options = {"num_classes": dataset.num_classes, "in_channels": dataset.image_shape[-1], "dtype": dtype}
    others = {"drop_path": config.model.drop_path, "dropout": config.model.dropout, "frozen": config.optim.freeze}
    options |= {name: value for name, value in others.items() if value}
    create = functools.partial(scconv_jax.create_model, config.model.name, **options)
    images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    try:
        model = create(axis_name=axis_name)
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        frozen = scconv_jax.frozen_mask(model, variables["params"]) if config.optim.freeze else None
    except ValueError as error:
        raise ConfigError(f"model.name {config.model.name!r}: {error}".replace(" frozen: ", " optim.freeze: ")) from error
    if not testing:
        check_statistics(config, create(), variables, images)
    normalizer = functools.partial(scconv_jax.images.normalize, mean=dataset.mean, std=dataset.std)
    return TrainingSetup(dataset, model, normalizer, make_parallel(config.parallel, jax.devices()), frozen)


def save_record(workdir: Path, config: Config, setup: TrainingSetup) -> None:
    """Write `model.json`, which says what answers about images need, to the run's folder."""
    dataset, size = setup.dataset, setup.dataset.image_shape[0]
    scconv_jax.runs.write_record(
        workdir,
        model=config.model.name,
        arguments={"num_classes": dataset.num_classes, "in_channels": dataset.image_shape[-1]},
        class_names=dataset.classes,
        preparation=scconv_jax.images.Preparation(size, dataset.resize, dataset.mean, dataset.std, config.data.exif),
    )


def check_same_images(dataset: Dataset) -> None:
    """Check that all hosts found the same classes and numbers of images, because each reads a part of every batch."""
    crc = zlib.crc32("\0".join(dataset.classes).encode(errors="surrogateescape")) >> 1
    hosts = all_gather_ints([len(dataset.train), len(dataset.test), dataset.num_classes, crc])
    other = next((host for host, found in enumerate(hosts) if found != hosts[0]), 0)
    if other:
        found = (hosts[other], hosts[0])
        there, here = (f"{train} training and {test} test images of {n} classes" for train, test, n, _ in found)
        names = ", of other names" if hosts[other][:3] == hosts[0][:3] else ""
        raise ConfigError(f"host {other} found {there}{names}, host 0 {here}: all hosts need the same images in data.dir")


def check_statistics(config: Config, network: nn.Module, variables: Any, images: Any) -> None:
    """Check that BatchNorm gets more than one value per channel where it gets one image; some networks have maps of one pixel."""
    batch, parts, devices, model = config.data.batch_size, config.optim.accumulate, jax.device_count(), config.model
    if batch != devices * parts or (model.sync_batchnorm and devices > 1):
        return
    try:
        rngs = {"dropout": jax.random.key(0)}
        jax.eval_shape(functools.partial(network.apply, train=True, mutable=["batch_stats"], rngs=rngs), variables, images)
    except ValueError as error:
        fits = [f"--data.batch-size {2 * batch}"]
        fits += [f"--optim.accumulate {fewer}" for fewer in range(parts - 1, 0, -1) if parts % fewer == 0][:1]
        fits += ["--model.sync-batchnorm"] * (devices > 1)
        where = f"each of {devices} devices" if devices > 1 else "the device"
        where += f" in each of {parts} parts (optim.accumulate)" if parts > 1 else ""
        raise ConfigError(
            f"data.batch_size {batch} gives {where} one image, too few for the BatchNorm of {model.name} at {images.shape[1]} × "
            f"{images.shape[2]} pixels: use {' or '.join(fits)}"
        ) from error


def make_step(setup: TrainingSetup, config: Config, optimizer: optax.GradientTransformation) -> Step:
    """Return (state, batch) → the next state and the metrics of the step. The step donates its state."""
    step = functools.partial(
        train_step,
        model=setup.model,
        optimizer=optimizer,
        augment=make_augment(config.data, config.augment),
        normalize=setup.normalize,
        label_smoothing=config.optim.label_smoothing,
        seed=config.seed,
        mix=make_mix(config.augment),
        parts=config.optim.accumulate,
        unroll=jax.devices()[0].platform == "cpu",  # XLA's convolutions on CPU are five times slower inside a loop
        rematerialise=config.model.rematerialise,
        ema_decay=config.optim.ema,
    )
    return setup.parallel.over_devices(step, donate_state=True)


def over_test_images(
    setup: TrainingSetup, config: Config, function: Callable[[Any], Any], stopping: Callable[[], bool] = lambda: False
) -> list[Any]:
    """Return what `function` returns for each batch of the test set. Once `stopping()`, a `StoppedError` is raised."""
    batches = eval_batches(
        setup.dataset.test,
        config.data.batch_size,
        threads=config.data.threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    results = []
    with DevicePrefetcher(batches, setup.parallel.put_batch, stopping) as prefetcher:
        for batch in prefetcher:
            results.append(function(batch))
            jax.block_until_ready(results[-RUN_AHEAD:][0])  # otherwise all test images could be on the device at once
    return results


def make_test(setup: TrainingSetup, config: Config) -> Callable[..., dict[str, float]]:
    """Return (state, stopping) → `eval/loss`, `eval/top1`, with more than five classes `eval/top5`, and `eval/images`.

    Every test image counts once. `eval/images` is the number of test images that could be read. Once `stopping()`, the test
    raises a `StoppedError`.
    """
    step = functools.partial(eval_step, model=setup.model, normalize=setup.normalize)
    sums_of = setup.parallel.over_devices(step, inference=True)

    def test(state: TrainState, stopping: Callable[[], bool] = lambda: False) -> dict[str, float]:
        sums = jax.device_get(over_test_images(setup, config, functools.partial(sums_of, state), stopping))
        totals = {key: float(sum(batch[key] for batch in sums)) for key in sums[0]}
        count = totals.pop("count")
        if not count:
            raise ConfigError("no image of the test set can be read")
        return {f"eval/{key}": total / count for key, total in totals.items()} | {"eval/images": int(count)}

    return test
