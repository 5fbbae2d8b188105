"""The NNX module that `to_nnx` makes. Only `bridge.py` imports this, late: users of Linen need no NNX."""

from __future__ import annotations

import inspect
from typing import Any

from flax.nnx.bridge import ToNNX


class NnxModule(ToNNX):
    """A Linen module in NNX that follows `module.train()` and `module.eval()`, and keeps its running statistics in training.

    `use_running_average` is the attribute that NNX sets for norms: True after `eval()`, False after `train()`.
    """

    @property
    def use_running_average(self) -> bool | None:
        """Whether calls without `train` evaluate. If None, they must say `train`."""
        return vars(self).get("to_nnx__evaluates")

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        self.to_nnx__evaluates = value  # ToNNX takes attributes of other names for variables

    def __call__(self, *args: Any, method: Any = None, **options: Any) -> Any:
        """Call the Linen module. See `to_nnx`."""
        function = getattr(type(self.to_nnx__module), method or "__call__") if isinstance(method, (str, type(None))) else method
        if self.use_running_average is not None and "train" in inspect.signature(function).parameters:
            options.setdefault("train", not self.use_running_average)
        if options.get("train") and options.get("mutable") is None:
            options["mutable"] = ["batch_stats"]
        return super().__call__(*args, method=method, **options)
