"""Networks in files of the user's own, which `verify` runs."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scconv_jax.interop.conversion import ConversionError

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

    def __call__(self, images: Any, entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the outputs of the modules that are our stages, and the logits, for images `(n, 3, h, w)`."""
        modules, found, handles = dict(self._module.named_modules()), {}, []

        def keep(stage: str, _module: Any, _inputs: Any, output: Any) -> None:
            found[stage] = output.clone()  # a ReLU may overwrite it

        for stage, names in STAGES.items():
            if name := next((name for name in names if name in modules), None):
                handles.append(modules[name].register_forward_hook(partial(keep, stage)))
        try:
            with _errors_of(self._flag):
                self._module.to(images.dtype)
                self._load(entries)
                output = self._module(images)
        finally:
            for handle in handles:
                handle.remove()
        return {**found, "logits": output} if getattr(output, "ndim", 0) == 2 else found

    def _load(self, entries: Mapping[str, np.ndarray]) -> None:
        import torch

        weights = {key: torch.from_numpy(np.array(value)) for key, value in entries.items() if key != "n_averaged"}
        self._module.load_state_dict(weights, strict=True)


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
    except (Exception, SystemExit) as error:
        first = " ".join(str(error).split())
        raise ConversionError(f"{what}: {type(error).__name__}: {first:.300}") from error
