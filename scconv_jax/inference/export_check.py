"""The sizes of an exported network's images, and the comparison of an exported file with the network."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import export as jax_export

from scconv_jax.inference.onnx_conversion import ExportError
from scconv_jax.layers.reconstruction import SRU

DYNAMIC = "dynamic"
_SHIFTS = (-1e-5, 1e-5)  # of the gates' threshold: rounding in float32, as layers before the gate enlarge it
_MARGIN = 4  # a shift moves all gates near the threshold to one side; rounding moves some to each


@dataclass(frozen=True)
class ImageSizes:
    """Batch and size of an exported network's images; None where they are open.

    Attributes:
        batch: Number of images.
        size: Height and width in pixels. If None, all multiples of `stride` from `smallest` on.
        channels: Channels of the images.
        stride: Output stride of the network.
        smallest: Smallest height and width that the network takes.
    """

    batch: int | None
    size: tuple[int, int] | None
    channels: int
    stride: int
    smallest: int

    @property
    def _least(self) -> int:
        return -(-self.smallest // self.stride)

    @property
    def text(self) -> str:
        """The shape as `jax.export.symbolic_shape` takes it: "n, 32*h, 32*w, 3"."""
        height, width = self.size or (f"{self.stride}*h", f"{self.stride}*w")
        return f"{self.batch or 'n'}, {height}, {width}, {self.channels}"

    def shape(self) -> tuple[Any, ...]:
        """Return the shape, with symbols where it is open."""
        constraints = [] if self.size else [f"{side} >= {self._least}" for side in "hw"]
        return tuple(jax_export.symbolic_shape(self.text, constraints=constraints))

    def samples(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of images to compare: of one size, or of two if the size is open."""
        least = self._least * self.stride
        sizes = [self.size] if self.size else [(least, least), (least + self.stride, least + 2 * self.stride)]
        return tuple((self.batch or 3, *size, self.channels) for size in sizes)


def image_sizes(name: str, model: Any, batch: Any, size: Any) -> ImageSizes:
    """Return the sizes that a user asks for.

    Raises:
        ExportError: A size is no positive number, or too small for the network.
    """
    if batch != DYNAMIC and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ExportError(f"batch={batch!r} must be a positive number of images, or {DYNAMIC!r}.")
    if size != DYNAMIC:
        if not (isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
            raise ExportError(f"size={size!r} must be height and width in pixels, or {DYNAMIC!r}.")
        if min(size) < model.smallest_image:
            raise ExportError(
                f"{name} needs images of at least {model.smallest_image}×{model.smallest_image} px; got {size[0]}×{size[1]}."
            )
    return ImageSizes(
        None if batch == DYNAMIC else batch,
        None if size == DYNAMIC else size,
        model.in_channels,
        max(feature.stride for feature in model.feature_info().values()),
        model.smallest_image,
    )


class Comparison(NamedTuple):
    """Result of `compare`."""

    difference: float
    """Largest difference from the network's logits, relative to the largest of them."""
    rounding: float
    """The network's own rounding error; 0 if the difference is within tolerance.

    It is the distance from its logits in float64, or how far they move if the gates' threshold does by 1e-5, if that is more.
    """
    images: tuple[tuple[int, ...], ...]
    """Shapes of the images that were compared."""


def compare(
    run: Callable[[np.ndarray], np.ndarray], model: Any, variables: Any, sizes: ImageSizes, tolerance: float
) -> Comparison:
    """Run an exported file and the network on random images.

    The gates of ScConv jump at their threshold: where a weight lies within rounding of it, two exact programs differ. So a
    difference above the tolerance is accepted if it is at most a few times the network's own rounding error.

    Raises:
        ExportError: They differ.
    """
    rng, largest, rounding = np.random.default_rng(0), 0.0, 0.0
    with on_cpu():
        network = jax.jit(functools.partial(model.apply, train=False))
        for shape in sizes.samples():
            images = rng.standard_normal(shape, np.float32)
            expected, found = np.asarray(network(variables, images)), run(images)
            if sizes.batch is None:  # another number of images, by the same program
                found = np.concatenate([run(images[:1]), found[1:]])
            if found.shape != expected.shape:
                raise ExportError(f"The exported file returns {found.shape} for images {shape}, the network {expected.shape}.")
            scale = np.abs(expected).max()
            difference = float(np.abs(found - expected).max() / scale)
            if not difference <= tolerance:
                rounding = max(rounding, float(np.abs(_in_float64(model, variables, images) - expected).max() / scale))
                for shift in _SHIFTS:
                    moved = _with_shifted_gates(model, variables, images, shift)
                    rounding = max(rounding, float(np.abs(moved - expected).max() / scale))
                if not difference <= _MARGIN * rounding:
                    raise ExportError(
                        f"The exported file differs from the network by {difference:.1e} of the largest logit on images {shape}; "
                        f"at most {tolerance:g} is accepted. Nothing was written."
                    )
            largest = max(largest, difference)
    return Comparison(largest, rounding, sizes.samples())


def _in_float64(model: Any, variables: Any, images: np.ndarray) -> np.ndarray:
    """Return the network's logits, computed in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        apply = functools.partial(model.clone(dtype=np.dtype("float64")).apply, train=False)
        return np.asarray(jax.jit(apply)(wide, images.astype(np.float64)))


def _with_shifted_gates(model: Any, variables: Any, images: np.ndarray, shift: float) -> np.ndarray:
    """Return the network's logits with the threshold of each spatial reconstruction unit moved."""

    def move(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        unit = context.module
        if not isinstance(unit, SRU) or not unit.path:  # without a path, it is the moved unit itself
            return next_call(*args, **kwargs)
        moved = unit.clone(parent=None, name=None, threshold=unit.threshold + shift)
        return moved.apply({"params": unit.variables["params"]}, *args, **kwargs)

    with nn.intercept_methods(move):
        return np.asarray(jax.jit(functools.partial(model.apply, train=False))(variables, images))


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU: other devices round products to fewer digits."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield
