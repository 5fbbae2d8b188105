"""The step of one device, mapped over all devices of this host: two engines, one step function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.step import AXIS

Step = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Parallel:
    """How to run a step (state, batch) → results on several devices. State and results are the same on each."""

    over_devices: Callable[..., Step]
    """(step, donate_state=False) → the same step for the whole batch."""
    put_batch: Callable[[Any], Any]
    """Host arrays (n, ...) → device arrays, split evenly."""
    put_state: Callable[[Any], Any]
    """Host arrays → device arrays, one copy on each device."""


def make_parallel(engine: str, devices: Sequence[Any]) -> Parallel:
    """`engine` is "shard_map" (`jax.jit` of `jax.shard_map` over a 1-D mesh) or "pmap"; `devices` are JAX's."""
    mesh = Mesh(np.asarray(devices), (AXIS,))
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)

    def with_shard_map(step: Step, donate_state: bool = False) -> Step:
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere)
        return jax.jit(mapped, donate_argnums=(0,) if donate_state else ())

    def with_pmap(step: Step, donate_state: bool = False) -> Step:
        donate = (0,) if donate_state else ()
        return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=donate)

    def stacked(batch: Any) -> Any:
        """(n, ...) → (devices, n / devices, ...): pmap wants the devices as a dimension of their own."""
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)

    def put(sharding: PartitionSpec) -> Callable[[Any], Any]:
        return lambda tree: jax.device_put(tree, NamedSharding(mesh, sharding))

    if engine == "pmap":
        return Parallel(with_pmap, lambda batch: put(split)(stacked(batch)), put(everywhere))
    return Parallel(with_shard_map, put(split), put(everywhere))


def run_once(make: Callable[[], Any]) -> Any:
    """What `make` returns, computed on the device by a program not worth optimising.

    Optimised, the random draws of a network's first state would take a CPU's compiler ten seconds and more.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(make, compiler_options=options)()
