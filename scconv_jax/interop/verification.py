"""Compares a converted network with PyTorch at each stage, on several kinds and sizes of images.

A difference is the largest in an image's map (or logits), relative to PyTorch's largest value there. Rounding
stays below 1e-12 in float64, where no systematic error can hide, and below 2e-5 in float32 through a hundred layers.

Some networks amplify rounding: in an untrained SCNet, maps grow from block to block, and gates amplify their rounding. So if
a difference is above its limit, PyTorch computes the network again, in float64, with slightly changed weights and images. The
change at a stage shows how large rounding can be there. A larger difference is an error. If rounding could hide any error,
nothing can be told in this precision.

JAX computes on the CPU, as PyTorch does: by default, GPUs and TPUs round the factors of float32 products to fewer bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scconv_jax.interop.conversion import ConversionError, Variables
from scconv_jax.interop.loading import Checkpoint, LoadedWeights
from scconv_jax.interop.recognition import options_from_entries
from scconv_jax.interop.references import FlaxNetwork, TorchReference
from scconv_jax.interop.torch_ghostnet import TorchGhostNet
from scconv_jax.interop.torch_networks import TorchResNet
from scconv_jax.models.registry import create_model, model_info

LIMITS = {"float64": 1e-12, "float32": 2e-5}
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}
"""Largest relative error of one rounding."""
PERTURBATION = 2.0**-40
"""Largest relative change of weights and pixels in the computation that measures how a network amplifies rounding."""
MARGIN = 256.0
"""Largest rounding at a stage, divided by the change there if weights and pixels change by one rounding. Measured: 1 to 59."""
TELLING = 1e-3
"""Rounding above this can hide any error."""
# Image sizes to compare at, by the size that the network was designed for.
SIZES = {224: ((224, 224), (256, 256), (193, 161)), 32: ((32, 32), (40, 40), (33, 27))}


class Difference(NamedTuple):
    """The difference at one stage on images of one kind."""

    stage: str
    dtype: str
    value: float
    images: str
    size: tuple[int, int]
    limit: float  # of rounding in most networks
    rounding: float = 0.0  # largest rounding in this network, if it was measured

    @property
    def verdict(self) -> str:
        """Return "equal", "differs", or "unclear" if rounding can be as large as the difference and hide any error."""
        if self.value <= self.limit:
            return "equal"
        if not np.isfinite(self.value) or not self.value <= self.rounding:
            return "differs"
        return "equal" if self.rounding <= TELLING else "unclear"


def sample_images(size: tuple[int, int], channels: int) -> dict[str, np.ndarray]:
    """Return images by kind, each `(h, w, channels)` float64: noise, gradients, a checkerboard, zeros and large values."""
    height, width = size
    noise = np.random.default_rng(0).standard_normal((2, height, width, channels))
    y, x = np.meshgrid(np.linspace(-2, 2, height), np.linspace(-2, 2, width), indexing="ij")
    squares = np.indices(size).sum(axis=0) // 8 % 2 * 4.0 - 2
    return {
        "noise": noise[0],
        "gradients": np.stack([(x, y, x * y)[channel % 3] for channel in range(channels)], axis=-1),
        "checkerboard": np.repeat(squares[..., None], channels, axis=-1),
        "zeros": np.zeros((height, width, channels)),
        "large values": 10 * noise[1],  # with larger values, rounding decides the gates
    }


def compare(
    checkpoint: Checkpoint,
    loaded: LoadedWeights,
    *,
    reference: str | None = None,
    flax: FlaxNetwork | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES[224],
    tolerance: float | None = None,
) -> Iterator[Difference]:
    """Yield the differences between JAX and PyTorch, for each precision, size, stage and kind of images.

    Args:
        checkpoint: Entries for PyTorch's side.
        loaded: The network and variables made from them.
        reference: `FILE.py:NAME`, a function or class that builds the network in PyTorch. The file is run. If None, PyTorch's
            operators compute the network from the checkpoint's own entries.
        flax: The network of the user's own that has the variables; `reference` is then its PyTorch counterpart. If None, the
            network is ours.
        sizes: Heights and widths of the images, in pixels.
        tolerance: Limit in float32, however much the network amplifies rounding. If None, the limit depends on the network.
    """
    # The user's renames make foreign keys known to PyTorch's side too, but renames that only exchange keys must show.
    foreign = reference is None and checkpoint.original.keys() != checkpoint.named.keys()
    own = checkpoint.named if foreign else checkpoint.original
    if flax is not None:  # the user's network has the prefix in its own names
        own = {checkpoint.prefix + key: value for key, value in own.items()}
    # In float32, the dtype of parameters here.
    entries = {key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in own.items()}
    run_torch, stages = _torch_side(checkpoint, loaded, reference, flax, entries)
    channels = flax.channels if flax else create_model(loaded.name, **loaded.options).in_channels
    images_of = partial(sample_images, channels=channels)

    @cache
    def amplification(size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return the relative change of each image's map at each stage, per relative change of weights and pixels."""
        noise = np.random.default_rng(1)

        def moved(x: np.ndarray) -> np.ndarray:
            return x if x.dtype == np.int64 else x * (1 + PERTURBATION * noise.uniform(-1, 1, x.shape))

        batch = np.stack(list(images_of(size).values()))
        before = run_torch("float64", entries, batch)
        after = [run_torch("float64", {key: moved(value) for key, value in entries.items()}, moved(batch)) for _ in range(2)]
        return {
            stage: np.max([_relative(maps[stage], before[stage]) for maps in after], axis=0) / PERTURBATION for stage in before
        }

    for dtype, limit in LIMITS.items():
        fixed = tolerance is not None and dtype == "float32"
        limit = tolerance if tolerance is not None and fixed else limit
        with jax.enable_x64(dtype == "float64"), jax.default_device(_cpu()):
            run_jax = _compiled(_of_ours(loaded, dtype) if flax is None else flax.runner(dtype, stages), dtype)
            variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), loaded.variables)  # noqa: B023 (used at once)
            for size in sizes:
                images = images_of(size)
                batch = np.stack(list(images.values())).astype(dtype)
                ours = run_jax(variables, jnp.asarray(batch))
                for stage, expected in run_torch(dtype, entries, batch).items():
                    # A head with initial values has other logits.
                    if stage not in ours or (stage == "logits" and loaded.conversion.kept):
                        continue
                    found = np.asarray(ours[stage])
                    if found.shape != expected.shape:
                        raise ConversionError(
                            f"{stage} has the shape {found.shape} here and {expected.shape} in PyTorch for images of "
                            f"{size[0]}×{size[1]}: the two networks differ. Check --model, --output-stride and --reference."
                        )
                    values, rounding = _relative(found, expected), np.zeros(len(found))
                    if not fixed and not (values <= limit).all():
                        rounding = MARGIN * UNIT[dtype] * amplification(size)[stage]
                    for kind, value, most in zip(images, values, rounding, strict=True):
                        yield Difference(stage, dtype, float(value), kind, size, limit, float(most))


def _torch_side(
    checkpoint: Checkpoint,
    loaded: LoadedWeights,
    reference: str | None,
    flax: FlaxNetwork | None,
    entries: Mapping[str, np.ndarray],
) -> tuple[Callable[[str, Mapping[str, np.ndarray], np.ndarray], dict[str, np.ndarray]], list[str]]:
    """Return a function of dtype, entries and images `(n, h, w, c)` that returns PyTorch's maps, and stages for `flax`."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError("verify compares with PyTorch, which is not installed: pip install torch") from error
    convention, stages = checkpoint.convention.name, []
    counterpart = None if flax else model_info(loaded.name).counterpart
    if flax is not None and reference is not None:
        network = TorchReference(reference, entries, {})
        prefix = (f"^{re.escape(checkpoint.prefix)}", "")
        stages = network.compare_at(flax.stages, (*checkpoint.given.rename, prefix, *checkpoint.convention.rename))
    elif reference is not None:
        network = TorchReference(reference, entries, options_from_entries(loaded.name, checkpoint.arrays))
    elif counterpart is None:
        raise ConversionError(f"{loaded.name} has no PyTorch counterpart here; give one by --reference FILE.py:NAME.")
    else:
        network = None
    stride = 1 if flax else getattr(create_model(loaded.name, **loaded.options), "output_stride", 1)

    def run(dtype: str, entries: Mapping[str, np.ndarray], batch: np.ndarray) -> dict[str, np.ndarray]:
        images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
        with torch.no_grad():
            if network is not None:
                maps = network(images, entries)
            elif counterpart == "ghostnet":
                maps = TorchGhostNet(entries, convention, dtype)(images)
            else:
                maps = TorchResNet(entries, convention, stride, loaded.options.get("variant", "paper"), dtype)(images)
            return {
                name: value.numpy().transpose(0, 2, 3, 1) if value.ndim == 4 else value.numpy() for name, value in maps.items()
            }

    return run, stages


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX is configured for other platforms only
        return None


def _compiled(run: Callable[..., Any], dtype: str) -> Callable[[Variables, jax.Array], Mapping[str, jax.Array]]:
    # LLVM's optimisation takes seconds for each float64 convolution and saves less than that.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0} if dtype == "float64" else None)


def _of_ours(loaded: LoadedWeights, dtype: str) -> Callable[[Variables, jax.Array], dict[str, jax.Array]]:
    """Return a function from variables and images to the maps and logits of one of our networks."""
    model: Any = create_model(loaded.name, **{**loaded.options, "dtype": jnp.dtype(dtype)})

    def run(variables: Variables, batch: jax.Array) -> dict[str, jax.Array]:
        maps: dict[str, Any] = dict(model.apply(variables, batch, train=False, method="features"))
        logits, state = model.apply(
            variables,
            batch,
            train=False,
            capture_intermediates=lambda module, _: module.path == ("bn1",),
            mutable=["intermediates"],
        )
        if model_info(loaded.name).counterpart is not None:  # in other networks, bn1 comes later
            maps["stem"] = state["intermediates"]["bn1"]["__call__"][0]
        return {**maps, "logits": logits}

    return run


def _relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the largest difference in each image's map, relative to the largest value there."""
    axes = tuple(range(1, ours.ndim))
    largest = np.abs(theirs).max(axes)
    with np.errstate(invalid="ignore"):
        differences = np.abs(ours - theirs).max(axes)
        relative = np.divide(differences, largest, out=np.where(differences > 0, np.inf, 0.0), where=largest > 0)
    # NaN and infinity on either side prove nothing.
    return np.where(np.isnan(relative) | np.isnan(differences) | np.isnan(largest), np.inf, relative)
