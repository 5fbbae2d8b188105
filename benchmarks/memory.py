"""Memory of a training step with each option, as XLA plans it for an accelerator's program. Nothing runs."""

from __future__ import annotations

import functools
import os
from typing import Any

# By default XLA on a CPU schedules for speed and recomputes too early. An accelerator's compiler schedules for memory too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_concurrency_optimized_scheduler=false"

import jax
import jax.numpy as jnp
import optax

import scconv_jax
from benchmarks.timing import record, table
from train.parallel import make_parallel
from train.step import init_state, train_step

MODEL, SIZE, BATCH = "scnet50", 160, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "`--optim.accumulate 4`": {"parts": 4},
    "`--model.rematerialise`": {"rematerialise": True},
    "both": {"parts": 4, "rematerialise": True},
}


def main() -> None:
    """Compile a step with each option and record the memory and multiply-adds that XLA reports."""
    model = scconv_jax.create_model(MODEL)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer, (SIZE, SIZE, 3), 0))
    images = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.uint8)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}
    parallel = make_parallel("shard_map", jax.devices()[:1])
    rows = []
    for name, options in OPTIONS.items():
        step = functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            augment=lambda _, images: images,
            normalize=lambda images: images.astype(jnp.float32) / 255,
            label_smoothing=0.1,
            seed=0,
            **options,
        )
        mapped: Any = parallel.over_devices(step, donate_state=True)
        compiled = mapped.lower(state, batch).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        rows.append([name, f"{memory.temp_size_in_bytes / 1e6:.0f}", f"{cost['flops'] / 2e9:.0f}"])
        print(*rows[-1], flush=True)
    text = table(["step", "intermediate results, MB", "multiply-adds, billions (loop bodies counted once)"], rows)
    record("memory", f"Memory of a training step: {MODEL}, {BATCH} images of {SIZE} px, float32", text)


if __name__ == "__main__":
    main()
