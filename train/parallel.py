"""Maps the step of one device over all devices of all hosts, with `shard_map` or `pmap`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import scconv_jax
from train.config import DivergedError
from train.step import AXIS

Step = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Parallel:
    """Functions that run a step (state, batch) → results on several devices. State and results are replicated."""

    over_devices: Callable[..., Step]
    """(step, donate_state=False, inference=False) → the step for the global batch; `inference`: it computes no gradient."""
    put_batch: Callable[[Any], Any]
    """Arrays (n, ...) of each host → global arrays (hosts * n, ...), sharded evenly over the devices."""
    put_state: Callable[[Any], Any]
    """Host arrays, equal on all hosts → arrays replicated on the devices."""
    check_same: Callable[[Any, int], None]
    """(state, step) → None. Raises a `DivergedError` that names the hosts and the first array whose bits differ from host 0's."""


def make_parallel(engine: str, devices: Sequence[Any]) -> Parallel:
    """Return the engine "shard_map" (over a 1-D mesh) or "pmap" over the devices of all hosts, the same number on each."""
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.asarray(devices), (AXIS,))
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)

    def over_devices(step: Step, donate_state: bool = False, inference: bool = False) -> Step:
        donate = (0,) if donate_state else ()
        if engine == "pmap":  # takes no options
            return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=donate)
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere)
        options = scconv_jax.inference_options(devices[0].platform) if inference else {}
        return jax.jit(mapped, donate_argnums=donate, compiler_options=options)

    def put_batch(batch: Any) -> Any:
        sharding, hosts = NamedSharding(mesh, split), len({device.process_index for device in devices})

        def put(x: np.ndarray) -> jax.Array:
            if engine == "pmap":  # expects an axis for the devices
                x = x.reshape(len(devices) // hosts, -1, *x.shape[1:])
            return jax.make_array_from_process_local_data(sharding, x, (hosts * x.shape[0], *x.shape[1:]))

        return jax.tree.map(put, batch)

    def put_state(state: Any) -> Any:
        sharding = NamedSharding(mesh, everywhere)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), x.shape), state)

    fingerprints = over_devices(_fingerprints)

    def check_same(state: Any, step: int) -> None:
        nothing = np.zeros(sum(device.process_index == jax.process_index() for device in devices), np.int32)
        of_devices = np.asarray(fingerprints(state, put_batch(nothing)))
        other = of_devices != of_devices[0]
        if other.any():
            hosts = sorted({device.process_index for device, differs in zip(devices, other.any(1), strict=True) if differs})
            path, _ = jax.tree.leaves_with_path(state)[int(other.any(0).argmax())]
            raise DivergedError(
                f"after step {step}, devices of host {', '.join(map(str, hosts))} hold other values of "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} than the first device of host 0: "
                "faulty memory or network, or hosts with different versions or hardware"
            )

    return Parallel(over_devices, put_batch, put_state, check_same)


def _fingerprints(state: Any, _batch: Any) -> jax.Array:
    """Return a checksum of each array on each device: uint32 (devices, arrays)."""

    def fingerprint(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).reshape(-1)
        places = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        return (words.astype(jnp.uint32) * places).sum(dtype=jnp.uint32)

    own = jnp.stack([fingerprint(leaf) for leaf in jax.tree.leaves(state)])
    everywhere = jnp.zeros((jax.lax.psum(1, AXIS), own.size), jnp.uint32)
    return jax.lax.psum(everywhere.at[jax.lax.axis_index(AXIS)].set(own), AXIS)


def from_host_0(tree: Any) -> Any:
    """Return host 0's NumPy arrays on all hosts, bit for bit; `tree` must have the same structure, shapes and dtypes on each."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    # Broadcast as bytes: JAX broadcasts by a sum, which would turn -0.0 into 0.0.
    flat = np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
    flat = multihost_utils.broadcast_one_to_all(flat)
    parts = np.split(flat, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    arrays = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def all_gather_ints(values: list[int]) -> list[list[int]]:
    """Return the `values` (int32, equally many on each host) of every host, on all hosts."""
    if jax.process_count() == 1:
        return [values]
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32))).tolist()


def run_once(make: Callable[[], Any]) -> Any:
    """Run `make` on the device, compiled without optimisation on the CPU.

    With optimisation, the CPU compiler needs ten seconds or more for the random draws of a network's initial state.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(make, compiler_options=options)()
