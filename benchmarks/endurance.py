"""Resident memory over many epochs, and the time that checkpoints take."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.timing import record
from train.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
EPOCHS, WARM = 50, 5
SMALL = """
from train.config import Config, Data, Log, Optim

config = Config(
    epochs=50,
    log_every=10,
    checkpoint_every=10,
    data=Data(name="synthetic", image_size=32, batch_size=32, crop_padding=4, synthetic_train=640, synthetic_test=200),
    optim=Optim(lr=0.01),
    log=Log(report=False),
)
"""
STEPS, EVERY = 1600, 100
LARGE = """
from train.config import Config, Data, Log, Optim

config = Config(
    epochs=1,
    log_every=50,
    checkpoint_every=100,
    data=Data(name="synthetic", image_size=32, batch_size=32, crop_padding=4, synthetic_train=32 * 1600, synthetic_test=32),
    optim=Optim(lr=0.01),
    log=Log(report=False),
)
"""


def main() -> None:
    """Measure and record."""
    with TemporaryDirectory() as name:
        memory = resident_memory(Path(name))
    with TemporaryDirectory() as name:
        lines = train(Path(name), "train.main", LARGE)
    first, warm = memory[WARM - 1], memory[WARM - 1 :]
    costs = checkpoint_costs(lines)
    record(
        "endurance",
        "Memory over many epochs, and time for checkpoints",
        f"**Memory.** A tiny network trains for {EPOCHS} epochs of 20 steps, with a test and two checkpoints in each epoch. "
        f"Resident memory is {first / 2**20:.0f} MiB after epoch {WARM}; later epochs differ by {percent(min(warm) / first - 1)} "
        f"to {percent(max(warm) / first - 1)}.\n\n"
        f"**Checkpoints.** scnet20_small trains on batches of 32 at 32 px, with a checkpoint every {EVERY} steps. "
        "A checkpoint is written during 50 steps; compared with the 50 steps before, these take longer by "
        f"{percent(statistics.median(costs))} of the time of {EVERY} steps "
        f"(median of {len(costs)}; {percent(min(costs))} to {percent(max(costs))}).",
    )


def percent(share: float) -> str:
    """Return a share as a percentage with its sign."""
    return f"{100 * share:+.1f} %"


def start(folder: Path, program: str, config: str) -> subprocess.Popen[str]:
    """Start the trainer in a new process, on one CPU device."""
    (folder / "config.py").write_text(config)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", program, "--config", "config.py", "--workdir", "run"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def train(folder: Path, program: str, config: str) -> list[dict[str, Any]]:
    """Train to the end and return the metrics."""
    process = start(folder, program, config)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return read_metrics(folder / "run" / "metrics.jsonl")


def resident_memory(folder: Path) -> list[int]:
    """Train and return the resident memory after each epoch, in bytes."""
    process, metrics, found = start(folder, "tests.train.tiny", SMALL), folder / "run" / "metrics.jsonl", []
    while process.poll() is None:
        tested = sum("eval/loss" in line for line in read_metrics(metrics)) if metrics.exists() else 0
        if tested > len(found):
            found += [_resident(process.pid)] * (tested - len(found))
        time.sleep(0.01)
    assert process.returncode == 0, process.communicate()[1]
    return found


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def checkpoint_costs(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the added time of each checkpoint as a share of the time of 100 steps without one."""
    seconds = {line["step"]: 1 / line["images_per_second"] for line in lines if "images_per_second" in line}
    return [(seconds[step + 50] - seconds[step]) / (2 * seconds[step]) for step in range(EVERY, STEPS, EVERY)]


if __name__ == "__main__":
    main()
