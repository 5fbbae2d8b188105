"""Checks before the first step: JAX uses the accelerator of this machine, and the training step fits into its memory."""

import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from train.config import Config, ConfigError
from train.config.files import override
from train.parallel import Step, all_gather_ints
from train.setup import TrainingSetup, make_step
from train.step import TrainState

INSTALL = {
    "an NVIDIA GPU": "pip install '.[cuda]' installs JAX's plug-in with the CUDA and cuDNN that it needs (LD_LIBRARY_PATH must "
    "not name others); the driver must be 525 or newer",
    "a TPU": "pip install '.[tpu]' installs JAX's plug-in, and one process at a time can use a TPU",
}
"""Accelerator → what makes it usable."""


def check_accelerator() -> None:
    """Start JAX's devices. Raise a `ConfigError` if JAX cannot use the GPU or TPU of this machine, unless the user chose the CPU.

    JAX itself only logs a warning, or fails with a traceback.
    """
    said, reason, platform = _Messages(), "", ""
    settings: Any = jax.config  # jax declares no types for its fields
    logger: Any = logging.getLogger()
    handlers, logger.handlers = logger.handlers, [said]
    try:
        platform = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        reason = str(error) or f"JAX_PLATFORMS={settings.jax_platforms} names no device of this machine"
    finally:
        logger.handlers = handlers
    found = visible_accelerator()
    if platform and (platform != "cpu" or settings.jax_platforms or found is None):
        for record in said.records:
            logger.handle(record)
        return
    reason = " ".join((reason or said.reason() or _quiet_reason(found)).split()).rstrip(".")
    what = f"this machine has {found}, but JAX cannot use it" if found else "JAX cannot start"
    raise ConfigError(f"{what}: {reason}." + (f" {INSTALL[found]}." if found else "") + " To compute on the CPU: --no-accel")


def visible_accelerator(root: Path = Path("/")) -> str | None:
    """Return "an NVIDIA GPU" or "a TPU" if this machine shows the device or its driver."""
    files = ("dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so.1")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # the last is SLURM's
    if not hidden and any((root / name).exists() for name in files):
        return "an NVIDIA GPU"
    google = any(path.read_text().strip() == "0x1ae0" for path in root.glob("sys/bus/pci/devices/*/vendor"))
    return "a TPU" if google and any((root / name).exists() for name in ("dev/accel0", "dev/vfio/0")) else None


class _Messages(logging.Handler):
    """Keeps the warnings that JAX and its plug-ins log while they start."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def reason(self) -> str:
        """Return the first message that gives a reason. That an accelerator "may be present" is none."""
        texts = [record.getMessage() + (f": {record.exc_info[1]}" if record.exc_info else "") for record in self.records]
        return next((text for text in texts if "may be present" not in text), "")


def _quiet_reason(accelerator: str | None) -> str:
    """Return the error that JAX does not log, or that there is no plug-in."""
    try:
        jax.devices("tpu" if accelerator == "a TPU" else "cuda")
    except RuntimeError as error:
        if "failed to initialize" in str(error):
            return str(error)
    return "JAX's plug-in for it is not installed"


def check_memory(
    config: Config, setup: TrainingSetup, optimizer: optax.GradientTransformation, state: TrainState, step: Step
) -> None:
    """Compile `step`, and raise a `ConfigError` with options that fit if it needs more memory than a device has.

    The program is kept, so the first call of `step` does not compile. If the memory is unknown, as on the CPU, nothing happens.
    """
    limit = min(kibibytes for (kibibytes,) in all_gather_ints([memory_limit() >> 10])) << 10
    if not limit or (need := memory_of(step, state, empty_batch(config, setup))) <= limit:
        return
    options = []
    for changes in smaller_steps(config, need, limit, state, math.prod(setup.dataset.image_shape)):
        flags = " ".join(
            f"--{name.replace('_', '-')}" + (f" {value}" if value is not True else "") for name, value in changes.items()
        )
        if any(option.split()[0] == flags.split()[0] for option in options):
            continue
        changed = override(config, changes)
        if memory_of(make_step(setup, changed, optimizer), state, empty_batch(changed, setup)) <= limit:
            options.append(flags)
    raise ConfigError(
        f"a step of data.batch_size {config.data.batch_size} needs {need / 1e9:.3g} GB on each device, which has "
        f"{limit / 1e9:.3g} GB: use {' or '.join(options) or 'smaller images, a smaller network or more devices'}"
    )


def empty_batch(config: Config, setup: TrainingSetup) -> Any:
    """Return a batch of zeros on the devices."""
    images = config.data.batch_size // jax.process_count()
    arrays = {"image": np.zeros((images, *setup.dataset.image_shape), np.uint8), "label": np.zeros(images, np.int32)}
    return setup.parallel.put_batch(arrays)


def memory_limit() -> int:
    """Return the bytes that JAX can use on the smallest device of this host, 0 if unknown."""
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())


def memory_of(step: Any, state: TrainState, batch: Any) -> int:
    """Return the bytes per device that the compiled step needs for its arguments, results and intermediate results."""
    try:
        memory = step.lower(state, batch).compile().memory_analysis()
    except RuntimeError as error:  # the compiler for TPUs refuses such a step
        found = re.search(r"RESOURCE_EXHAUSTED.* Used ([\d.]+)([KMGT]?) of ", str(error), re.DOTALL)
        if found is None:
            raise
        return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    if memory is None:
        return 0
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def smaller_steps(config: Config, need: int, limit: int, state: TrainState, image_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield changes of fields with which the step may fit, the smallest changes first.

    The estimate: the state, the batch, one set of gradients, and the same memory for each image that a device computes at once.
    """
    batch, parts = config.data.batch_size, config.optim.accumulate
    at_once, pairs = batch // jax.device_count() // parts, 2 if config.augment.mixup or config.augment.cutmix else 1
    fixed = sum(leaf.nbytes for leaf in jax.tree.leaves((state, state.params))) + at_once * parts * image_bytes
    for factor in range(2, at_once // 2 + 1):
        fewer, rest = divmod(at_once, factor)
        if rest == fewer % pairs == 0 and fixed + (need - fixed) / factor <= limit:
            yield {"optim.accumulate": parts * factor}
            lr = {} if config.optim.lr_reference_batch else {"optim.lr": float(f"{config.optim.lr / factor:.3g}")}
            yield {"data.batch_size": batch // factor, **lr}
    if not config.model.rematerialise:
        yield {"model.rematerialise": True}
