"""The measurements of `benchmarks.device`, each for a process of its own.

python -m benchmarks.device_measurements full|small NAME [NETWORK]   # prints the result as JSON on its last line
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import scconv_jax
from benchmarks.timing import environment
from train.config import Config, Data, Model, make_plan
from train.data.batches import train_batches
from train.devices import check_accelerator, memory_limit
from train.initial_state import InitialState
from train.optim import make_optimizer
from train.run.metrics import read_metrics
from train.run.profiler import peak_multiply_adds, training_multiply_adds
from train.setup import make_setup, make_step


@dataclass(frozen=True)
class Form:
    """Networks and sizes of the full and of the small form."""

    networks: tuple[str, str, str]
    batch: int
    size: int
    seconds: float
    """Duration of a speed measurement."""
    equal: tuple[tuple[str, int, int], ...]
    """Networks whose outputs are compared, with images and their size."""
    digits: tuple[str, ...] = ()
    """Flags of the run on the digits."""


FULL = Form(
    networks=("resnet50", "scnet50", "scconv_resnet50"),
    batch=256,
    size=224,
    seconds=4.0,
    equal=(("scnet20_small", 8, 32), ("scconv_resnet20_small", 8, 32), ("scnet50", 2, 193)),
)
SMALL = Form(
    networks=("resnet20_small", "scnet20_small", "scconv_resnet20_small"),
    batch=8,
    size=16,
    seconds=0.3,
    equal=(("scnet20_small", 2, 16),),
    digits=("--epochs", "2", "--optim.warmup-epochs", "0"),
)


def device(_form: Form) -> dict[str, Any]:
    """Return what JAX runs on."""
    check_accelerator()
    found = jax.devices()[0]
    memory = f"{memory_limit() / 1e9:.1f} GB" if memory_limit() else "unknown"
    return {"platform": found.platform, "environment": environment(), "devices": jax.device_count(), "memory for JAX": memory}


def equality(_form: Form, name: str, images: str, size: str) -> dict[str, Any]:
    """Return the differences of logits and gradients from float64 on the CPU, as norms relative to the norm of the exact values.

    float32, at the highest precision of products, and bfloat16 are as exact as they should be if they differ by at most 2e-5, or
    four times as much as on the CPU, which tells what rounding alone does.
    """
    compute = functools.partial(outputs, name, int(images), int(size))
    exact, result = compute("float64", jax.devices("cpu")[0]), {}
    for dtype in ("float32", "bfloat16"):
        here, cpu = (compute(dtype, where) for where in (jax.devices()[0], jax.devices("cpu")[0]))
        for what, values in exact.items():
            ours, theirs = (float(np.linalg.norm(found[what] - values) / np.linalg.norm(values)) for found in (here, cpu))
            result |= {f"{dtype}, {what}": ours, f"{dtype}, {what}, CPU": theirs}
            result[f"{dtype}, {what}: as exact as on the CPU"] = ours <= max(2e-5, 4 * theirs)
    return result


def outputs(name: str, images: int, size: int, dtype: str, where: Any) -> dict[str, np.ndarray]:
    """Return the logits and the gradient of their weighted sum to the images, with random parameters and statistics."""
    with jax.enable_x64(dtype == "float64"), jax.default_device(where), jax.default_matmul_precision("highest"):
        rng, stored = np.random.default_rng(0), "float64" if dtype == "float64" else "float32"
        x, weights = (jnp.asarray(rng.normal(size=shape), stored) for shape in ((images, size, size, 3), (images, 10)))
        model = scconv_jax.create_model(name, num_classes=10, dtype=jnp.dtype(dtype))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

        def draw(path: Any, like: Any) -> jax.Array:
            if path[-1].key in ("scale", "var"):
                return jnp.asarray(rng.uniform(0.5, 1.5, like.shape), stored)
            return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(max(1, np.prod(like.shape[:-1]))), stored)

        variables = jax.tree.map_with_path(draw, shapes)

        def weighted(x: jax.Array) -> Any:
            logits: Any = model.apply(variables, x, train=False)
            return (logits * weights).sum(), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(x)
        return {"logits": np.asarray(logits, np.float64), "gradient": np.asarray(gradient, np.float64)}


def training(name: str, form: Form) -> tuple[Any, Any, Any, Any]:
    """Return set-up, compiled step, state and a batch of the trainer, with `form.batch` images for each device."""
    batch_size = form.batch * jax.device_count()
    data = Data(name="synthetic", image_size=form.size, batch_size=batch_size, synthetic_train=batch_size, synthetic_classes=1000)
    config = Config(model=Model(name=name, dtype="bfloat16"), data=data)
    setup, optimizer = make_setup(config), make_optimizer(config.optim, 1e-3)
    plan = make_plan(config, batch_size, jax.device_count())
    state, _ = InitialState(config, plan, setup.model, optimizer, setup.dataset.image_shape).create()
    batch = next(train_batches(setup.dataset.train, batch_size, seed=0, first_step=0, threads=1))
    return setup, make_step(setup, config, optimizer), setup.parallel.put_state(state), setup.parallel.put_batch(batch)


def bits(form: Form) -> dict[str, str]:
    """Return the SHA-256 of the state after five steps of a small network."""
    _, step, state, batch = training(form.equal[0][0], SMALL)
    for _ in range(5):
        state, _ = step(state, batch)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return {"SHA-256 of the state": digest.hexdigest()}


def speed(form: Form, name: str) -> dict[str, Any]:
    """Return images per second, share of the device's peak and peak memory, in bfloat16, with the trainer's own step."""
    setup, step, state, batch = training(name, form)
    images, peak = form.batch * jax.device_count(), peak_multiply_adds(jax.devices())
    multiply_adds = training_multiply_adds(setup.model, setup.dataset.image_shape)

    def rates(work: str, run: Callable[[], Any], cost: float) -> dict[str, Any]:
        rate = images * calls_per_second(run, jax.block_until_ready, form.seconds)
        memory = [device.memory_stats() or {} for device in jax.local_devices()]
        return {
            f"{work}, images/s": rate,
            f"{work}, share of the peak": peak and rate * cost / peak,
            f"{work}, peak memory": max(stats.get("peak_bytes_in_use", 0) for stats in memory) or None,
        }

    variables = jax.tree.map(jnp.copy, {"params": state.params, "batch_stats": state.batch_stats})
    infer = jax.jit(
        lambda variables, images: setup.model.apply(variables, setup.normalize(images), train=False),
        compiler_options=scconv_jax.inference_options(),
    )
    inference = rates("inference", lambda: infer(variables, batch["image"]), multiply_adds / 3)

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return rates("training", train, multiply_adds) | inference


def torch_speed(form: Form, name: str) -> dict[str, Any]:
    """Return images per second and peak memory of PyTorch on one GPU: `torch.compile`, autocast to bfloat16, channels-last.

    The small form compiles nothing.
    """
    import torch

    from tests.reference import networks as oracles

    gpu = torch.cuda.is_available()
    if form is FULL and not gpu:
        return {"not measured": "PyTorch finds no CUDA device"}
    kind = "cuda" if gpu else "cpu"
    torch.backends.cudnn.benchmark = True
    model: Any = oracles.build(name, num_classes=1000)
    model = model.to(kind, memory_format=torch.channels_last)
    model = torch.compile(model) if form is FULL else model
    x = torch.randn(form.batch, 3, form.size, form.size, device=kind).to(memory_format=torch.channels_last)
    y = torch.arange(form.batch, device=kind) % 1000
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)

    def train() -> Any:
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    def infer() -> Any:
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16):
            model(x)

    def wait(_: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    result: dict[str, Any] = {}
    for work, run in (("training", train), ("inference", infer)):
        model.train(work == "training")
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        result[f"{work}, images/s"] = form.batch * calls_per_second(run, wait, form.seconds)
        result[f"{work}, peak memory"] = torch.cuda.max_memory_allocated() if gpu else None
    return result


def calls_per_second(run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> float:
    """Return the rate of `run`, in blocks of ten calls, after the calls that compile; `wait` waits for the result of a call."""
    for _ in range(3):
        wait(run())
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        wait([run() for _ in range(10)][-1])
        count += 10
    return count / (time.perf_counter() - start)


def digits(form: Form) -> dict[str, Any]:
    """Return seconds and test accuracy of the default run of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "train.main", "--workdir", f"{folder}/run", *form.digits], check=True, stdout=sys.stderr
        )
        tested = [line for line in read_metrics(Path(folder, "run", "metrics.jsonl")) if "eval/top1" in line][-1]
    return {"seconds": time.perf_counter() - start, "epochs": tested["epoch"], "top-1": tested["eval/top1"]}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "device": device,
    "equality": equality, "speed": speed, "torch_speed": torch_speed, "bits": bits, "digits": digits,
}  # fmt: skip


FORMS = {"full": FULL, "small": SMALL}

if __name__ == "__main__":
    form_name, measurement, *arguments = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[measurement](FORMS[form_name], *arguments)))
