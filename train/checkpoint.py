"""Training states on disk: Orbax behind four operations. The only file that knows Orbax."""

from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from train.config import ConfigError


class Checkpoints:
    """The folder `checkpoints/STEP/` of a run, with the state in `state/` and its test metrics in `metrics/`.

    Keeps the latest `keep` steps and the one of the best `eval/top1`.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        self.directory = workdir.resolve() / "checkpoints"

        def top1(metrics: dict[str, float]) -> float:
            return metrics["eval/top1"]

        # `best_fn` has the metrics written; what is kept is decided by the policy alone.
        best = BestN(get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                best_fn=top1,
                enable_async_checkpointing=False,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The last step saved; None before the first."""
        return self._manager.latest_step()

    def save(self, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Save `state` under its step, unless that step is there already.

        Raises:
            FloatingPointError: a value of the state is not finite. Nothing is written.
        """
        state = jax.device_get(state)
        step = int(state.step)
        for name, leaf in _named_leaves(state).items():
            if not np.isfinite(leaf).all():
                raise FloatingPointError(f"{name} is not finite at step {step}")
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), metrics=metrics)

    def restore(self, like: Any) -> Any:
        """The latest state, as NumPy arrays; `like` is a state of the same structure, or its shapes.

        Raises:
            ConfigError: there is no checkpoint, or it holds other arrays than `like`.
        """
        step = self.latest()
        if step is None:
            raise ConfigError(f"no checkpoint in {self.directory}")
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        saved = self._manager.item_metadata(step)["state"].tree
        found = {name: leaf.shape for name, leaf in _named_leaves(saved).items() if hasattr(leaf, "shape")}
        wanted = {name: leaf.shape for name, leaf in _named_leaves(like).items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ConfigError(
                    f"the checkpoint {self.directory / str(step)} is of another model: "
                    f"{name} is {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                )
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]


def _named_leaves(tree: Any) -> dict[str, Any]:
    """`params/conv1/kernel` → leaf."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
