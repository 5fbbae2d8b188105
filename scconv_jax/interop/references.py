"""Networks in files of the user's own, which `verify` runs."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scconv_jax.interop.conversion import ConversionError, Variables
from scconv_jax.interop.keys import Rename, rename_key

OUTPUT = "output"
"""Name of the result of a network of the user's own, as a stage."""

STAGES = {  # modules of PyTorch networks whose outputs are our stages
    "stem": ("bn1", "backbone.bn1", "features.init_block.conv.bn", "features.init_block.conv3.bn"),
    **{f"layer{i}": (f"layer{i}", f"backbone.layer{i}", f"features.stage{i}") for i in range(1, 5)},
}


class TorchReference:
    """A PyTorch network of the user's own."""

    def __init__(self, reference: str, entries: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> None:
        """Run the user's file, build the network that it defines, and load the entries into it."""
        self._flag = f"--reference {reference}"
        make = load_object("--reference", reference, "scnet.py:scnet50")
        with _errors_of(self._flag):
            accepted = inspect.signature(make).parameters
            takes_classes = "num_classes" in accepted or any(item.kind is item.VAR_KEYWORD for item in accepted.values())
            self._module = make(**{key: value for key, value in options.items() if key == "num_classes" and takes_classes})
            self._module.eval()
            self._load(entries)
        modules = dict(self._module.named_modules())
        found = {stage: next((name for name in names if name in modules), "") for stage, names in STAGES.items()}
        self._stages = {stage: name for stage, name in found.items() if name}
        self._result = "logits"

    def compare_at(self, stages: Sequence[str], rename: Sequence[Rename]) -> list[str]:
        """Compare at the outermost modules that have the names of `stages` after renaming, and at the result.

        Returns:
            The stages found.
        """
        found: dict[str, str] = {}
        for name, _ in self._module.named_modules():
            stage = rename_key(f"{name}.", rename).strip(".")
            inside = any(stage.startswith(f"{other}.") for other in found)
            if stage in stages and not inside:
                found[stage] = name
        self._stages, self._result = found, OUTPUT
        return list(found)

    def __call__(self, images: Any, entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the outputs of the modules that are stages, and the result, for images `(n, c, h, w)`."""
        modules, found, handles = dict(self._module.named_modules()), {}, []

        def keep(stage: str, _module: Any, _inputs: Any, output: Any) -> None:
            if hasattr(output, "clone"):
                found[stage] = output.clone()  # a ReLU may overwrite it

        for stage, name in self._stages.items():
            handles.append(modules[name].register_forward_hook(partial(keep, stage)))
        try:
            with _errors_of(self._flag):
                self._module.to(images.dtype)
                self._load(entries)
                output = self._module(images)
        finally:
            for handle in handles:
                handle.remove()
        is_result = getattr(output, "ndim", 0) == 2 or (self._result == OUTPUT and hasattr(output, "clone"))
        return {**found, self._result: output} if is_result else found

    def _load(self, entries: Mapping[str, np.ndarray]) -> None:
        import torch

        weights = {key: torch.from_numpy(np.array(value)) for key, value in entries.items() if key != "n_averaged"}
        self._module.load_state_dict(weights, strict=True)


class FlaxNetwork:
    """A Flax network of the user's own."""

    def __init__(self, reference: str, shape: tuple[int, int, int]) -> None:
        """Run the user's file, build the network that it defines, and trace it for images of `shape` (h, w, c)."""
        self.channels, self._flag = shape[-1], f"--flax {reference}"
        make = load_object("--flax", reference, "net.py:Net")
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        with _errors_of(self._flag):
            model = make if isinstance(make, nn.Module) else make()
            if not isinstance(model, nn.Module):
                raise TypeError(f"expected a flax.linen.Module, got {type(model).__name__}")
            self._model: Any = model
            takes_train = "train" in inspect.signature(type(model).__call__).parameters
            self._options: dict[str, Any] = {"train": False} if takes_train else {}
            key = jax.eval_shape(jax.random.key, 0)
            traced: Any = jax.eval_shape(partial(model.init, **self._options), key, images)
            self.template: Variables = {name: traced[name] for name in ("params", "batch_stats") if name in traced}
            _, state = jax.eval_shape(partial(self._apply, model, None), self.template, images)
        self.stages = _called(state["intermediates"])
        """Names of the modules, such as `layer1.0.conv1`."""

    def runner(self, dtype: str, stages: Sequence[str]) -> Callable[[Variables, jax.Array], dict[str, jax.Array]]:
        """Return a function from variables and images `(n, h, w, c)` to the outputs at the stages, and the result."""
        has_dtype = getattr(self._model, "dtype", None) is not None
        model = self._model.clone(dtype=jnp.dtype(dtype)) if has_dtype else self._model

        def run(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
            with _errors_of(self._flag):
                output, state = self._apply(model, stages, variables, images)
            found = {OUTPUT: output}
            for stage in stages:
                node = state["intermediates"]
                for part in stage.split("."):
                    node = node[part]
                found[stage] = node["__call__"][-1]
            return {stage: value for stage, value in found.items() if hasattr(value, "ndim")}

        return run

    def _apply(self, model: nn.Module, stages: Sequence[str] | None, variables: Any, images: Any) -> Any:
        def captured(module: nn.Module, method: str) -> bool:
            return method == "__call__" and (stages is None or ".".join(module.path) in stages)

        return model.apply(variables, images, **self._options, capture_intermediates=captured, mutable=["intermediates"])


def _called(intermediates: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[str]:
    found = [".".join(path)] if path and "__call__" in intermediates else []
    for name, inner in intermediates.items():
        if isinstance(inner, Mapping):
            found += _called(inner, (*path, name))
    return found


def load_object(flag: str, reference: str, example: str) -> Any:
    """Run the user's file in `FILE.py:NAME` and return its NAME."""
    path, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("reference", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise ConversionError(f"{flag} {reference}: expected FILE.py:NAME, such as {example}, and a file that exists.")
    python = importlib.util.module_from_spec(spec)
    with _errors_of(f"{flag} {reference}"):
        spec.loader.exec_module(python)
        return getattr(python, name)


@contextlib.contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line."""
    try:
        yield
    except ConversionError:
        raise
    except (Exception, SystemExit) as error:
        first = " ".join(str(error).split())
        raise ConversionError(f"{what}: {type(error).__name__}: {first:.300}") from error
