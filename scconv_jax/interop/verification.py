"""Whether a converted network computes what PyTorch computes: at each stage, on images of several kinds and sizes.

A difference is the largest of an image's map (or logits) over the largest value that PyTorch has there. In float64 rounding
stays below 1e-12, and nothing systematic can hide; in float32, which networks run in, below 2e-5 through a hundred layers.

JAX computes on the CPU, as PyTorch does: GPUs and TPUs round the factors of float32 products to fewer digits by default.
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

from scconv_jax.interop.conversion import ConversionError, Variables, normalised, to_torch
from scconv_jax.interop.loading import Entries
from scconv_jax.interop.recognition import options_shown
from scconv_jax.interop.torch_ghostnet import GhostNetwork
from scconv_jax.interop.torch_networks import Network
from scconv_jax.models.ghostnet import GhostNet
from scconv_jax.models.registry import create_model
from scconv_jax.models.resnet import ResNet

LIMITS = {"float64": 1e-12, "float32": 2e-5}
SIZES = ((224, 224), (256, 256), (193, 161))
SMALL_SIZES = ((32, 32), (40, 40), (33, 27))

Stages = dict[str, np.ndarray]  # stage to maps (n, h, w, c), or logits (n, classes)


class Difference(NamedTuple):
    """The largest difference at one stage, and on what."""

    stage: str
    dtype: str
    value: float
    images: str
    size: tuple[int, int]


def images(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return images by kind, each `(h, w, 3)` float64: noise, gradients, a checkerboard, zeros, and large values."""
    height, width = size
    noise = np.random.default_rng(0).standard_normal((2, height, width, 3))
    y, x = np.meshgrid(np.linspace(-2, 2, height), np.linspace(-2, 2, width), indexing="ij")
    squares = np.indices(size).sum(axis=0) // 8 % 2 * 4.0 - 2
    return {
        "noise": noise[0],
        "gradients": np.stack([x, y, x * y], axis=-1),
        "checkerboard": np.repeat(squares[..., None], 3, axis=-1),
        "zeros": np.zeros((height, width, 3)),
        "large values": 10 * noise[1],  # far larger, and rounding decides what the gates let through
    }


def compare(
    found: Entries,
    name: str,
    options: Mapping[str, Any],
    variables: Variables,
    *,
    reference: str | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
    without: Sequence[str] = (),
) -> Iterator[Difference]:
    """Run a network in JAX and in PyTorch.

    Args:
        found: the checkpoint.
        name: of the network; with `options` and `variables`, what it was converted to.
        options: of `create_model`.
        variables: of the network.
        reference: `FILE.py:NAME`, a function or class that makes the network in PyTorch. The file is run. Where not given, the
            network is computed by PyTorch's operators from the checkpoint's own entries.
        sizes: heights and widths of the images, pixels.
        without: stages that cannot be compared.

    Yields:
        For each precision, size and stage, the largest difference over the kinds of images.

    Raises:
        ConversionError: PyTorch is not installed, or there is no reference for this network.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError("verify compares with PyTorch, which is not installed: pip install torch") from error
    entries = _own_entries(found)
    module = None if reference is None else load_reference(reference, entries, options_shown(name, found.arrays))
    for dtype in LIMITS:
        with jax.enable_x64(dtype == "float64"), jax.default_device(_cpu()), torch.no_grad():
            model = create_model(name, **{**options, "dtype": jnp.dtype(dtype)})
            if module is not None:
                theirs = partial(_staged, module.to(getattr(torch, dtype)))
            elif isinstance(model, ResNet):
                theirs = Network(entries, found.naming.name, model.output_stride, options.get("variant", "paper"), dtype)
            elif isinstance(model, GhostNet):
                theirs = GhostNetwork(entries, found.naming.name, dtype)
            else:
                raise ConversionError(f"There is no PyTorch counterpart of {name} here; give one by --reference FILE.py:NAME.")
            ours = _compiled(model, dtype)
            cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)  # noqa: B023 (used at once)
            for size in sizes:
                kinds = images(size)
                batch = np.stack(list(kinds.values())).astype(dtype)
                got = ours(cast, jnp.asarray(batch))
                expected = {stage: _channels_last(value) for stage, value in theirs(_tensor(batch)).items()}
                for stage in expected:
                    if stage in got and stage not in without:
                        yield _difference(stage, dtype, size, list(kinds), np.asarray(got[stage]), expected[stage])


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to know others alone
        return None


def _own_entries(found: Entries) -> dict[str, np.ndarray]:
    """The checkpoint's entries under its own names, in float32, which parameters have here."""
    arrays = to_torch(found.source.variables or {}) if found.source.tensors is None else normalised(found.source.tensors)
    return {name: value if value.dtype == np.int64 else value.astype(np.float32) for name, value in arrays.items()}


def _compiled(model: Any, dtype: str) -> Callable[[Variables, jax.Array], Mapping[str, jax.Array]]:
    # LLVM's optimisations take seconds for each float64 convolution, and save less.
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
        if isinstance(model, (ResNet, GhostNet)):
            maps["stem"] = state["intermediates"]["bn1"]["__call__"][0]
        return {**maps, "logits": logits}

    return run


def _difference(
    stage: str, dtype: str, size: tuple[int, int], kinds: Sequence[str], ours: np.ndarray, theirs: np.ndarray
) -> Difference:
    if ours.shape != theirs.shape:
        raise ConversionError(
            f"{stage} has the shape {ours.shape} here and {theirs.shape} in PyTorch, of images {size[0]}×{size[1]}: the two "
            "are not the same network. Check --model, --output-stride and --reference."
        )
    axes = tuple(range(1, ours.ndim))
    largest = np.abs(theirs).max(axes)
    with np.errstate(invalid="ignore"):
        differences = np.abs(ours - theirs).max(axes)
        relative = np.divide(differences, largest, out=np.where(differences > 0, np.inf, 0.0), where=largest > 0)
    # What is no number on either side proves nothing.
    relative = np.where(np.isnan(relative) | np.isnan(differences) | np.isnan(largest), np.inf, relative)
    worst = int(relative.argmax())
    return Difference(stage, dtype, float(relative[worst]), kinds[worst], size)


def load_reference(reference: str, entries: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> Any:
    """Run a file of the user's, make the network that it defines, and fill it.

    Raises:
        ConversionError: the file or the name does not exist, making the network fails, or the entries do not fit it.
    """
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
        takes = inspect.signature(make).parameters
        takes_classes = "num_classes" in takes or any(taken.kind is taken.VAR_KEYWORD for taken in takes.values())
        module = make(**{key: value for key, value in options.items() if key == "num_classes" and takes_classes})
        weights = {key: torch.from_numpy(np.array(value)) for key, value in entries.items() if key != "n_averaged"}
        module.load_state_dict(weights, strict=True)
    except (Exception, SystemExit) as error:  # whatever the user's code does
        first = " ".join(str(error).split())
        raise ConversionError(f"--reference {reference}: {type(error).__name__}: {first:.300}") from error
    return module.eval()


_MODULES = {  # where other people's networks have our stages
    "stem": ("bn1", "backbone.bn1", "features.init_block.conv.bn", "features.init_block.conv3.bn"),
    **{f"layer{i}": (f"layer{i}", f"backbone.layer{i}", f"features.stage{i}") for i in range(1, 5)},
}


def _staged(module: Any, batch: Any) -> dict[str, Any]:
    """Outputs of a PyTorch network and of those of its modules that are our stages."""
    modules, found, handles = dict(module.named_modules()), {}, []

    def keep(stage: str, _module: Any, _inputs: Any, output: Any) -> None:
        found[stage] = output.clone()  # a ReLU may be computed in place

    for stage, names in _MODULES.items():
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


def _tensor(batch: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))


def _channels_last(value: Any) -> np.ndarray:
    array = value.numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
