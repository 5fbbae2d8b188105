"""Multiply-adds of a training step, peak rates of devices, and a profiler for single steps.

A training step counts as three forward passes, as is usual: outputs, gradients of the inputs, gradients of the kernels.
Rematerialised operations count once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax

import scconv_jax

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}
"""Part of `jax.Device.device_kind` (the first match counts) → peak operations per second; a multiply-add is two operations.

Values are for bfloat16 without sparsity, from NVIDIA's data sheets (H200, H100, A100) and cloud.google.com/tpu/docs (v6e, v5e,
v5p, v4).
"""


def training_multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Return the multiply-adds of training on one image of shape (h, w, 3)."""
    return 3 * scconv_jax.multiply_adds(model, (image_shape[0], image_shape[1]))


def peak_multiply_adds(devices: Sequence[Any]) -> float | None:
    """Return the peak multiply-adds per second of all devices together, or None if a device is unknown."""
    peaks = [next((peak for part, peak in PEAKS.items() if part in device.device_kind), None) for device in devices]
    return None if None in peaks else sum(peak / 2 for peak in peaks if peak is not None)


class Profiler:
    """Profiles the steps `(first, last)` into a folder, for TensorBoard's profile plugin and ui.perfetto.dev. `()`: none."""

    def __init__(self, steps: tuple[int, ...], folder: Path) -> None:
        self._steps, self._folder, self._running = steps, folder, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call before a step starts."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, results: Any) -> bool:
        """Call with the results of a step. Return whether the profile is now complete."""
        if not (self._running and step == self._steps[1]):
            return False
        jax.block_until_ready(results)
        self._stop()
        return True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
