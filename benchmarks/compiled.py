"""Programs that XLA compiles for NVIDIA GPUs and TPUs, on a machine without one: memory traffic, temporaries, collectives.

    make accelerators                          the recorded table of whole networks (an hour or more on two cores)
    make accelerators ARGS=--check             short networks of each family against benchmarks/results/compiled_short.json (CI)
    make accelerators ARGS=--record-short      write that record anew
    make accelerators ARGS=--scale             the collectives for up to 256 devices
    python -m benchmarks.compiled --one '{"target": "h100", "network": "scnet50"}' --top 20 [--hlo FILE]      one program

The figures describe programs; nothing is run or timed. A program's bytes divided by the device's bandwidth give a lower limit
of its time.
Every program is compiled in a process of its own, because a fault of XLA's compiler aborts the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHORT_RECORD = RESULTS / "compiled_short.json"
BYTES_MARGIN = 1.03  # the check allows this factor over the recorded bytes


@dataclasses.dataclass(frozen=True)
class Target:
    """A device that XLA compiles for, with the figures of its data sheet."""

    name: str
    platform: str
    topology: str
    bandwidth: float
    """Bytes per second of its memory."""
    peak: float
    """bfloat16 FLOP per second."""
    memory: float
    """Bytes."""
    batch: int
    """Images per device."""


TARGETS = {
    "h100": Target("NVIDIA H100 SXM", "cuda", "1x1x1", 3.35e12, 989e12, 80e9, 256),
    "v5e": Target("TPU v5e", "tpu", "v5e:2x2", 0.82e12, 197e12, 16e9, 128),
    "v5p": Target("TPU v5p", "tpu", "v5p:2x2x1", 2.77e12, 459e12, 95e9, 128),
    "v6e": Target("TPU v6e", "tpu", "v6e:2x2", 1.64e12, 918e12, 32e9, 128),
}
PLAIN = "plain Flax ResNet-50"
NETWORKS = ("resnet50", "scnet50", "scconv_resnet50", PLAIN)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program to compile."""

    target: str
    network: str
    mode: str = "train"
    """ "train" or "infer"."""
    dtype: str = "bfloat16"
    size: int = 224
    batch: int | None = None
    """Images per device. If None, those of the target."""
    short: bool = False
    """Only the first two stages, one block each, where the network is a residual one."""
    engine: str = "shard_map"
    parts: int = 1
    rematerialise: bool = False
    topology: str | None = None
    """If None, that of the target."""

    def label(self) -> str:
        """Return what differs from the defaults, as one line."""
        default = Program(self.target, self.network)
        fields = [field.name for field in dataclasses.fields(self)[2:]]
        extra = [f"{name}={getattr(self, name)}" for name in fields if getattr(self, name) != getattr(default, name)]
        return " ".join([self.target, self.network, *extra])


FAMILIES = (
    "resnet50",
    "scnet50",
    "scconv_resnet50",
    "scnet50_v1d",
    "scnext50",
    "se_scnet50",
    "wrn28_10_small",
    "scconv_wrn28_10_small",
    "densenet121_small",
    "scconv_densenet121_small",
    "ghost_resnet50",
    "ghostnet_100",
    "resnext29_small",
)
_short = functools.partial(Program, short=True, size=64, batch=16)
# To compile for a TPU takes minutes, not seconds as for a GPU, and less for small maps.
_shortest = functools.partial(Program, short=True, batch=4)
SHORT: list[Program] = [
    *(_short("h100", name) for name in FAMILIES),
    _short("h100", "scnet50", mode="infer"),
    _short("h100", "scnet50", dtype="float32"),
    _short("h100", "scnet50", engine="pmap"),
    _short("h100", "scnet50", parts=4),
    _short("h100", "scnet50", rematerialise=True),
    _short("h100", "scnet50", topology="1x1x8"),
    *(_short("v5e", name) for name in FAMILIES[:3]),
    _short("v5e", "scnet50", mode="infer"),
    *(_shortest("v5e", name, size=16 if name.endswith("_small") else 32) for name in FAMILIES[3:]),
]
"""A short network of each family, and one network in each way to train."""


def prepare_environment(platform: str) -> None:
    """Set what JAX needs to compile for a device that is not there. Call it before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if platform == "tpu":
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    else:
        os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # there is nothing to time kernels on


def compile_program(program: Program) -> Any:
    """Return XLA's compiled program for a topology without devices."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import topologies

    import scconv_jax
    from train.parallel import make_parallel
    from train.step import eval_step, init_state, train_step

    target = TARGETS[program.target]
    topology = program.topology or target.topology
    if target.platform == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    else:
        gpu = Path(__file__).with_name("h100.txtpb").read_text()
        devices = topologies.get_topology_desc(platform="cuda", target_config=gpu, topology=topology).devices

    model = network(program)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    shape = (program.size, program.size, 3)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer, shape, 0))
    images = (program.batch or target.batch) * len(devices)
    batch = {"image": jax.ShapeDtypeStruct((images, *shape), jnp.uint8), "label": jax.ShapeDtypeStruct((images,), jnp.int32)}
    normalize = functools.partial(scconv_jax.images.normalize, mean=(0.5,) * 3, std=(0.25,) * 3)
    if program.mode == "infer":
        step: Any = functools.partial(eval_step, model=model, normalize=normalize)
        batch["weight"] = jax.ShapeDtypeStruct((images,), jnp.float32)
    else:
        step = functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            augment=lambda _keys, x: x,
            normalize=normalize,
            label_smoothing=0.1,
            seed=0,
            parts=program.parts,
            rematerialise=program.rematerialise,
        )
    if program.engine == "pmap":
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(devices), x.shape[0] // len(devices), *x.shape[1:]), x.dtype), batch
        )
    parallel = make_parallel(program.engine, devices)
    return parallel.over_devices(step, donate_state=program.mode == "train").lower(state, batch).compile()  # pyright: ignore


def network(program: Program) -> Any:
    """Return the network, short if the program says so."""
    import jax.numpy as jnp

    import scconv_jax
    from benchmarks.plain_resnet import PlainResNet

    dtype = jnp.dtype(program.dtype)
    if program.network == PLAIN:
        return PlainResNet(stage_sizes=(1, 1) if program.short else (3, 4, 6, 3), dtype=dtype)
    model: Any = scconv_jax.create_model(program.network, dtype=dtype)
    if not program.short:
        return model
    if hasattr(model, "stage_sizes"):
        return model.clone(stage_sizes=(1, 1), planes=model.planes[:2], output_stride=model.stem_stride * 2)
    if hasattr(model, "depth"):
        return model.clone(depth=10, width=2)
    return model.clone(block_sizes=(1, 1)) if hasattr(model, "block_sizes") else model


def measure(program: Program, top: int = 8, hlo: str | None = None) -> dict[str, Any]:
    """Compile a program and return its figures."""
    prepare_environment(TARGETS[program.target].platform)
    import jax

    from benchmarks import hlo_text

    began = time.perf_counter()
    compiled = compile_program(program)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if hlo:
        Path(hlo).write_text(text)
    cost = compiled.cost_analysis() or {}
    return {
        **dataclasses.asdict(program),
        "jax": jax.__version__,
        "compiler": compiler(TARGETS[program.target].platform),
        "seconds_to_compile": round(time.perf_counter() - began, 1),
        **hlo_text.figures(text, top),
        "model_flops": model_flops(program),
        "bytes_accessed": cost.get("bytes accessed"),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "reduced_bytes": reduced_bytes(program),
        "least_bytes": least_bytes(program),
    }


def compiler(platform: str) -> str:
    """Return the package that holds XLA's compiler for a platform, with its version."""
    package = "libtpu" if platform == "tpu" else "jax-cuda12-plugin"
    return f"{package} {importlib.metadata.version(package)}"


def reduced_bytes(program: Program) -> int:
    """Return the bytes of gradients and BatchNorm statistics, which a step averages over the devices."""
    import jax
    import jax.numpy as jnp

    init = functools.partial(network(program).init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, program.size, program.size, 3)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


def model_flops(program: Program) -> float | None:
    """Return the floating-point operations for a device's images: two per multiply-add, three times as many in training."""
    from scconv_jax.models.complexity import multiply_adds

    if program.short:
        return None
    counted = network(dataclasses.replace(program, network="resnet50") if program.network == PLAIN else program)
    images = program.batch or TARGETS[program.target].batch
    return 2 * (3 if program.mode == "train" else 1) * images * multiply_adds(counted, (program.size, program.size))


def least_bytes(program: Program) -> int | None:
    """Return the least bytes that a whole training step reads and writes on a GPU, where `benchmarks.floor` can count them."""
    from benchmarks.floor import floor_bytes

    target = TARGETS[program.target]
    if target.platform != "cuda" or program.short or program.mode != "train" or program.network == PLAIN:
        return None
    return floor_bytes(network(program), program.batch or target.batch, program.size)


def in_a_process(program: Program) -> dict[str, Any]:
    """Compile a program in a process of its own. If that fails, return the end of what it said as `error`."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--one", json.dumps(dataclasses.asdict(program))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return json.loads(run.stdout)
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if "Check failed" in line or "Error" in line), (lines or [""])[-1])
    return {**dataclasses.asdict(program), "error": f"exit code {run.returncode}: {reason.strip()[-300:]}"}


def side_by_side(programs: list[Program]) -> Iterator[tuple[Program, dict[str, Any]]]:
    """Compile as many programs at a time as there are cores, and yield them in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(programs, pool.map(in_a_process, programs), strict=True)


def check() -> int:
    """Compile the short programs and compare them with the record. Return the exit code."""
    recorded = {Program(**entry["program"]): entry for entry in json.loads(SHORT_RECORD.read_text())["programs"]}
    faults = []
    for program, found in side_by_side(SHORT):
        known = recorded.get(program)
        fault = judge(found, known)
        faults += [fault] if fault else []
        same = known is not None and found.get("compiler") == known["compiler"]
        print(
            f"{program.label()}: {fault or summary(found)}{'' if same or fault else ' (recorded with another compiler)'}",
            flush=True,
        )
    print(
        "\n".join(
            ["", f"{len(faults)} of {len(SHORT)} programs failed."]
            if faults
            else ["", f"All {len(SHORT)} programs are as recorded."]
        )
    )
    return 1 if faults else 0


def summary(found: dict[str, Any]) -> str:
    """Return bytes, collectives and compile time as text."""
    megabytes, collectives = traffic(found) / 1e6, found["collectives"]["count"]
    return f"{megabytes:,.0f} MB, {collectives} collectives, compiled in {found['seconds_to_compile']:.0f} s"


def judge(found: dict[str, Any], known: dict[str, Any] | None) -> str | None:
    """Return what is wrong with a compiled program compared with its record, or None."""
    if "error" in found:
        return f"does not compile: {found['error']}"
    if known is None:
        return "is not in the record; run with --record-short"
    # Another version of the compiler makes another program.
    if found["compiler"] == known["compiler"] and traffic(found) > known["bytes"] * BYTES_MARGIN:
        return f"reads and writes {traffic(found) / 1e6:.1f} MB, recorded {known['bytes'] / 1e6:.1f} MB"
    if found["collectives"]["count"] > known["collectives"]:
        return f"has {found['collectives']['count']} collectives, recorded {known['collectives']}"
    return None


def traffic(found: dict[str, Any]) -> float:
    """Return the bytes that a program reads and writes: XLA's own count for TPUs, the sum over kernels for GPUs."""
    return found["bytes_accessed"] if TARGETS[found["target"]].platform == "tpu" else found["kernel_bytes"]


def record_short() -> int:
    """Compile the short programs and write their record, after each. Return the exit code."""
    entries: list[dict[str, Any]] = []
    for program, found in side_by_side(SHORT):
        print(f"{program.label()}: {found.get('error') or summary(found)}", flush=True)
        if "error" not in found:
            figures = {"compiler": found["compiler"], "bytes": traffic(found), "collectives": found["collectives"]["count"]}
            entries.append({"program": dataclasses.asdict(program), **figures})
        SHORT_RECORD.write_text(json.dumps({"programs": entries}, indent=1) + "\n")
    return 1 if len(entries) < len(SHORT) else 0


SCALE = [
    *(_short("v5e", "scnet50", topology=topology) for topology in ("v5e:2x2", "v5e:8x8", "v5e:16x16")),
    *(_short("h100", "scnet50", topology=topology) for topology in ("1x1x1", "1x1x8")),
]


def whole(only: list[str]) -> int:
    """Compile the whole networks for the targets and write the report after each. Return the exit code."""
    return report([Program(target, name) for target in only or TARGETS for name in NETWORKS])


def report(programs: list[Program]) -> int:
    """Compile programs and write the report after each. Return the exit code."""
    from benchmarks import compiled_report

    failed = False
    for program in programs:
        found = in_a_process(program)
        failed |= "error" in found
        print(program.label(), found.get("error") or summary(found), flush=True)
        compiled_report.add(found)
    return 1 if failed else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare short networks with their record")
    parser.add_argument("--record-short", action="store_true", help="record the short networks")
    parser.add_argument("--scale", action="store_true", help="record the collectives of one network for 1 to 256 devices")
    parser.add_argument("--one", help="fields of one program, as JSON")
    parser.add_argument("--top", type=int, default=8, help="number of largest kernels to list, with --one")
    parser.add_argument("--hlo", help="file for the compiled program's text, with --one")
    parser.add_argument("targets", nargs="*", help=f"only these targets, of {', '.join(TARGETS)}")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"there is no target {min(unknown)!r}; choose from {', '.join(TARGETS)}")
    if options.one:
        print(json.dumps(measure(Program(**json.loads(options.one)), options.top, options.hlo), indent=1))
        return 0
    if options.check:
        return check()
    if options.record_short:
        return record_short()
    return report(SCALE) if options.scale else whole(options.targets)


if __name__ == "__main__":
    sys.exit(main())
