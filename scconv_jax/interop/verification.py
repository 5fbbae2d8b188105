"""Compares a converted network with PyTorch at each stage, on several kinds and sizes of images.

A difference is the largest in an image's map (or logits), relative to PyTorch's largest value there. Rounding
stays below 1e-12 in float64, where no systematic error can hide, and below 2e-5 in float32 through a hundred layers.

JAX computes on the CPU, as PyTorch does: by default, GPUs and TPUs round the factors of float32 products to fewer bits.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scconv_jax.interop.conversion import ConversionError, Variables
from scconv_jax.interop.loading import Checkpoint, LoadedWeights
from scconv_jax.interop.recognition import options_from_entries
from scconv_jax.interop.torch_ghostnet import TorchGhostNet
from scconv_jax.interop.torch_networks import TorchResNet
from scconv_jax.models.registry import create_model, model_info

LIMITS = {"float64": 1e-12, "float32": 2e-5}
# Image sizes to compare at, by the size that the network was designed for.
SIZES = {224: ((224, 224), (256, 256), (193, 161)), 32: ((32, 32), (40, 40), (33, 27))}


class Difference(NamedTuple):
    """The largest difference at one stage, and the images that show it."""

    stage: str
    dtype: str
    value: float
    images: str
    size: tuple[int, int]


def sample_images(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return images by kind, each `(h, w, 3)` float64: noise, gradients, a checkerboard, zeros and large values."""
    height, width = size
    noise = np.random.default_rng(0).standard_normal((2, height, width, 3))
    y, x = np.meshgrid(np.linspace(-2, 2, height), np.linspace(-2, 2, width), indexing="ij")
    squares = np.indices(size).sum(axis=0) // 8 % 2 * 4.0 - 2
    return {
        "noise": noise[0],
        "gradients": np.stack([x, y, x * y], axis=-1),
        "checkerboard": np.repeat(squares[..., None], 3, axis=-1),
        "zeros": np.zeros((height, width, 3)),
        "large values": 10 * noise[1],  # with larger values, rounding decides the gates
    }


def compare(
    checkpoint: Checkpoint,
    loaded: LoadedWeights,
    *,
    reference: str | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES[224],
) -> Iterator[Difference]:
    """Yield the largest difference between JAX and PyTorch over the kinds of images, for each precision, size and stage.

    Args:
        checkpoint: Entries for PyTorch's side.
        loaded: The network and variables made from them.
        reference: `FILE.py:NAME`, a function or class that builds the network in PyTorch. The file is run. If None, PyTorch's
            operators compute the network from the checkpoint's own entries.
        sizes: Heights and widths of the images, in pixels.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError("verify compares with PyTorch, which is not installed: pip install torch") from error
    # In float32, the dtype of parameters here.
    entries = {key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in checkpoint.original.items()}
    module = (
        None if reference is None else load_reference(reference, entries, options_from_entries(loaded.name, checkpoint.arrays))
    )
    counterpart = model_info(loaded.name).counterpart
    for dtype in LIMITS:
        with jax.enable_x64(dtype == "float64"), jax.default_device(_cpu()), torch.no_grad():
            model: Any = create_model(loaded.name, **{**loaded.options, "dtype": jnp.dtype(dtype)})
            convention = checkpoint.convention.name
            if module is not None:
                run_torch = partial(_run_module, module.to(getattr(torch, dtype)))
            elif counterpart == "resnet":
                run_torch = TorchResNet(entries, convention, model.output_stride, loaded.options.get("variant", "paper"), dtype)
            elif counterpart == "ghostnet":
                run_torch = TorchGhostNet(entries, convention, dtype)
            else:
                raise ConversionError(f"{loaded.name} has no PyTorch counterpart here; give one by --reference FILE.py:NAME.")
            run_jax = _compiled(model, dtype, stem=counterpart is not None)
            cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), loaded.variables)  # noqa: B023 (used at once)
            for size in sizes:
                images = sample_images(size)
                batch = np.stack(list(images.values())).astype(dtype)
                ours = run_jax(cast, jnp.asarray(batch))
                theirs = run_torch(torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))
                for stage, value in theirs.items():
                    # A head with initial values has other logits.
                    if stage in ours and not (stage == "logits" and loaded.conversion.kept):
                        expected = value.numpy().transpose(0, 2, 3, 1) if value.ndim == 4 else value.numpy()
                        yield _difference(stage, dtype, size, list(images), np.asarray(ours[stage]), expected)


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX is configured for other platforms only
        return None


def _compiled(model: Any, dtype: str, *, stem: bool) -> Callable[[Variables, jax.Array], Mapping[str, jax.Array]]:
    # LLVM's optimisation takes seconds for each float64 convolution and saves less than that.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0} if dtype == "float64" else None)
    def run(variables: Variables, batch: jax.Array) -> dict[str, jax.Array]:
        maps: dict[str, Any] = dict(model.apply(variables, batch, train=False, method="features"))
        logits, state = model.apply(
            variables,
            batch,
            train=False,
            capture_intermediates=lambda module, _: module.path == ("bn1",),
            mutable=["intermediates"],
        )
        if stem:  # in other networks, bn1 comes later
            maps["stem"] = state["intermediates"]["bn1"]["__call__"][0]
        return {**maps, "logits": logits}

    return run


def _difference(
    stage: str, dtype: str, size: tuple[int, int], images: Sequence[str], ours: np.ndarray, theirs: np.ndarray
) -> Difference:
    if ours.shape != theirs.shape:
        raise ConversionError(
            f"{stage} has the shape {ours.shape} here and {theirs.shape} in PyTorch for images of {size[0]}×{size[1]}: the two "
            "networks differ. Check --model, --output-stride and --reference."
        )
    axes = tuple(range(1, ours.ndim))
    largest = np.abs(theirs).max(axes)
    with np.errstate(invalid="ignore"):
        differences = np.abs(ours - theirs).max(axes)
        relative = np.divide(differences, largest, out=np.where(differences > 0, np.inf, 0.0), where=largest > 0)
    # NaN and infinity on either side prove nothing.
    relative = np.where(np.isnan(relative) | np.isnan(differences) | np.isnan(largest), np.inf, relative)
    worst = int(relative.argmax())
    return Difference(stage, dtype, float(relative[worst]), images[worst], size)


def load_reference(reference: str, entries: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> Any:
    """Run the user's file, build the network that it defines, and load the entries into it."""
    import torch

    path, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("reference", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise ConversionError(
            f"--reference {reference}: expected FILE.py:NAME, such as scnet.py:scnet50, and a file that exists."
        )
    python = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(python)
        make = getattr(python, name)
        accepted = inspect.signature(make).parameters
        takes_classes = "num_classes" in accepted or any(item.kind is item.VAR_KEYWORD for item in accepted.values())
        module = make(**{key: value for key, value in options.items() if key == "num_classes" and takes_classes})
        weights = {key: torch.from_numpy(np.array(value)) for key, value in entries.items() if key != "n_averaged"}
        module.load_state_dict(weights, strict=True)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        first = " ".join(str(error).split())
        raise ConversionError(f"--reference {reference}: {type(error).__name__}: {first:.300}") from error
    return module.eval()


_STAGES = {  # modules of PyTorch networks whose outputs are our stages
    "stem": ("bn1", "backbone.bn1", "features.init_block.conv.bn", "features.init_block.conv3.bn"),
    **{f"layer{i}": (f"layer{i}", f"backbone.layer{i}", f"features.stage{i}") for i in range(1, 5)},
}


def _run_module(module: Any, batch: Any) -> dict[str, Any]:
    """Return the output of a PyTorch network and those of its modules that are our stages."""
    modules, found, handles = dict(module.named_modules()), {}, []

    def keep(stage: str, _module: Any, _inputs: Any, output: Any) -> None:
        found[stage] = output.clone()  # a ReLU may overwrite it

    for stage, names in _STAGES.items():
        for name in names:
            if name in modules:
                handles.append(modules[name].register_forward_hook(partial(keep, stage)))
                break
    try:
        output = module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {**found, "logits": output} if getattr(output, "ndim", 0) == 2 else found
