"""Small study on the digits: which operator should replace the 3×3 convolution?

Every network is `resnet20_small` with another operator in place of the 3×3 convolution in each bottleneck; the self-calibrated
one is `scnet20_small`, with SCNet's bottleneck. All train at 16×16 px by the recipe of `configs/digits.py`, which was not
tuned for this study. Each runs with five seeds; the seed determines weights, order and crops. The study reports the test accuracy
after the last epoch and selects nothing by it.

    python -m benchmarks.digits_study [--seeds 5] [--jobs 2]
    python -m benchmarks.digits_study --times     # measure step times again, keep the recorded accuracies

Each process runs on one core. A step's time is processor time, which other processes disturb little.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.timing import RESULTS, record, table

SIZE = 16
TIMED_STEPS = 40

# Row labels in table order.
OPERATORS = (
    "plain 3×3",
    "self-calibrated (2020)",
    "ScConv paper, S+C",
    "ScConv 2023-07, S+C",
    "ScConv 2023-09, S+C",
    "ScConv 2023-10, S+C",
    "ScConv paper, C+S",
    "ScConv paper, S&C",
    "ScConv paper, S",
    "ScConv paper, C",
    "ghost",
)


def build(operator: str) -> Any:
    """Return the network of one row."""
    import scconv_jax
    from scconv_jax.layers.ghost import GhostConv
    from scconv_jax.models.blocks import Bottleneck
    from scconv_jax.models.resnet import NARROW, ResNet

    if operator == "plain 3×3":
        return scconv_jax.create_model("resnet20_small")
    if operator == "self-calibrated (2020)":
        return scconv_jax.create_model("scnet20_small")
    if operator == "ghost":
        conv: Callable[..., Any] = GhostConv
    else:
        variant, arrangement = operator.removeprefix("ScConv ").split(", ")
        conv = functools.partial(scconv_jax.ScConv, variant=variant, arrangement=arrangement)
    return ResNet(functools.partial(Bottleneck, conv=conv), (2, 2, 2), **NARROW)


def study(operator: str, seeds: int) -> dict[str, Any]:
    """Train one row's network with each seed, compiling once. With `seeds=0`, only time some steps."""
    import jax
    import numpy as np

    import scconv_jax
    from configs.digits import config
    from train.config import Data, make_plan
    from train.data.augment import make_augment
    from train.data.batches import eval_batches, train_batches
    from train.data.datasets import load_dataset
    from train.optim import make_optimizer, make_schedule
    from train.step import AXIS, eval_step, init_state, train_step

    data = Data(**{**vars(config.data), "image_size": SIZE})
    dataset = load_dataset(data)
    plan = make_plan(config, len(dataset.train), 1)
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, plan))
    model = build(operator)
    normalizer = functools.partial(scconv_jax.images.normalize, mean=dataset.mean, std=dataset.std)
    augment = make_augment(data)

    def step(state: Any, batch: Any, seed: Any) -> Any:
        smoothing = config.optim.label_smoothing
        return train_step(
            state,
            batch,
            model=model,
            optimizer=optimizer,
            augment=augment,
            normalize=normalizer,
            label_smoothing=smoothing,
            seed=seed,
        )

    mesh = jax.sharding.Mesh(jax.devices()[:1], (AXIS,))
    everywhere, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    mapped = functools.partial(jax.shard_map, mesh=mesh, out_specs=everywhere)
    next_state = jax.jit(mapped(step, in_specs=(everywhere, split, everywhere)), donate_argnums=0)
    test = jax.jit(mapped(functools.partial(eval_step, model=model, normalize=normalizer), in_specs=(everywhere, split)))
    first_state = jax.jit(lambda seed: init_state(model, optimizer, dataset.image_shape, seed))

    parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(first_state, 0).params))
    accuracies, seconds = [], []
    for seed in range(max(seeds, 1)):
        state = first_state(seed)
        batches = train_batches(dataset.train, data.batch_size, seed=seed, first_step=0, threads=1)
        for _ in range(plan.total_steps if seeds else TIMED_STEPS):
            batch = next(batches)
            start = time.process_time()
            state, metrics = next_state(state, batch, seed)
            jax.block_until_ready(metrics)
            seconds.append(time.process_time() - start)
        if not seeds:
            break
        sums = [test(state, batch) for batch in eval_batches(dataset.test, data.batch_size, threads=1)]
        accuracies.append(100 * float(np.sum([s["top1"] for s in sums]) / np.sum([s["count"] for s in sums])))
    return {
        "operator": operator,
        "parameters": parameters,
        "accuracies": accuracies,
        "step_ms": 1e3 * statistics.median(seconds),
    }


def _on_one_core(number: Any, jobs: int) -> None:
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[mine % len(cores)]} if jobs > 1 else set(cores[:1]))


def main() -> None:
    """Run the study and write table, numbers and plot to `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs per network (default: 5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel processes (default: one per core)")
    parser.add_argument("--times", action="store_true", help="only measure step times again")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with concurrent.futures.ProcessPoolExecutor(options.jobs, context, _on_one_core, (number, options.jobs)) as pool:
        rows = []
        for row in pool.map(functools.partial(study, seeds=0 if options.times else options.seeds), OPERATORS):
            rows.append(row)
            print(
                f"{row['operator']:24} {row['step_ms']:6.1f} ms",
                *(f"{accuracy:.2f}" for accuracy in row["accuracies"]),
                flush=True,
            )
    if options.times:
        times = {row["operator"]: row["step_ms"] for row in rows}
        rows = json.loads((RESULTS / "digits_study.json").read_text())
        rows = [row | {"step_ms": times[row["operator"]]} for row in rows]
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Write table, numbers and plot."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "digits_study.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    plot(rows)
    text = table(
        ["operator", "test accuracy, %", "parameters", "step, ms"],
        [[r["operator"], summary(r["accuracies"]), f"{r['parameters']:,}", f"{r['step_ms']:.1f}"] for r in rows],
    )
    seeds = len(rows[0]["accuracies"])
    note = (
        f"`resnet20_small` with each operator in place of its 3×3 convolutions, trained on the digits at {SIZE}×{SIZE} px by the "
        f"recipe of `configs/digits.py`. Accuracy: mean ± standard deviation over {seeds} seeds. "
        "Step: processor time for 32 images on one core.\n\n"
    )
    meaning = (
        "\n\nOne test image is 0.28 %, so differences of a few tenths are noise, and results on so small a task say little about "
        "others. They do show that the paper's form trains in every arrangement. The two oldest public versions draw γ from a "
        "normal distribution, so its sum can be nearly zero: their results depend on the seed, and with this recipe one of them "
        "fails for some seeds."
    )
    record("digits_study", "The operators on the digits", note + text + meaning)


def summary(accuracies: list[float]) -> str:
    """Return mean ± standard deviation as text."""
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{statistics.mean(accuracies):.2f} ± {deviation:.2f}"


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw the accuracy of each run as a point, one row per network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for position, row in enumerate(reversed(rows)):
        axes.scatter(row["accuracies"], [position] * len(row["accuracies"]), s=22, alpha=0.55, color="tab:blue", linewidths=0)
        axes.scatter([statistics.mean(row["accuracies"])], [position], marker="|", s=260, color="black")
    labels = [f"{row['operator']}  ({row['parameters'] / 1e3:.0f} k, {row['step_ms']:.0f} ms)" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("test accuracy, % (one point per seed, bar: mean)")
    figure.suptitle("Digits: operators in place of the 3×3 convolution (parameters, step on one core)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(RESULTS / "digits_study.png", dpi=130)


if __name__ == "__main__":
    main()
