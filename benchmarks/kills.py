"""Proves that a run killed repeatedly by SIGKILL, at random moments, ends in the same bits as an uninterrupted run.

It trains the tiny network of the tests, because the trainer is the same for every network.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.train.tiny import final_state
from train.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = """
from train.config import Config, Data, Log, Optim

config = Config(
    epochs=8,
    log_every=10,
    checkpoint_every=30,
    data=Data(name="synthetic", image_size=8, batch_size=16, crop_padding=1, synthetic_train=1600, synthetic_test=1600),
    optim=Optim(lr=0.1),
    log=Log(report=False),
)
"""
TIMES = {"images_per_second", "waiting_for_data", "multiply_adds_per_second", "peak_share", "seconds"}
KILLS = 20


def started(workdir: Path, since: float) -> bool:
    """Whether the run has written its config since then, so that it is compiling or taking its first steps."""
    return _newer(workdir / "config.json", since)


def saving(workdir: Path, since: float) -> bool:
    """Whether a checkpoint is being written."""
    return any(_newer(path, since) for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def testing(workdir: Path, since: float) -> bool:
    """Whether the latest epoch has ended but its test has not."""
    lines = read_metrics(metrics) if _newer(metrics := workdir / "metrics.jsonl", since) else []
    return bool(lines) and lines[-1]["step"] % 100 == 0 and "eval/loss" not in lines[-1]


def running(workdir: Path, since: float) -> bool:
    """Whether the run has logged steps since then."""
    return _newer(workdir / "metrics.jsonl", since)


def _newer(path: Path, since: float) -> bool:
    """Whether the file was written since then. Files of the previous process do not count."""
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def _latest(workdir: Path) -> int:
    """Return the step of the latest checkpoint, or 0 if there is none."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


MOMENTS: dict[str, Callable[[Path, float], bool]] = {
    "start-up": lambda *_: True,
    "the first steps": started,
    "a save": saving,
    "a test": testing,
    "some step": running,
}


def kill_and_resume(folder: Path, moments: Sequence[str], seed: int) -> tuple[Counter[str], list[int]]:
    """Run `killed` in `folder`, kill it at each of `moments`, resume it each time, and let it finish.

    Returns:
        The number of kills by moment, and the steps from which the run resumed.
    """
    rng, workdir, killed, resumed = random.Random(seed), folder / "killed", Counter[str](), []
    for moment in (*moments, None):
        since, before = time.time(), _latest(workdir)
        process = start(folder, "killed", *(["--resume"] if (workdir / "config.json").exists() else []))
        if moment is not None:
            # These moments wait for a new checkpoint, so that the kills spread over the whole run.
            further = moment in ("a save", "a test", "some step")
            while process.poll() is None and ((further and _latest(workdir) == before) or not MOMENTS[moment](workdir, since)):
                time.sleep(0.001)
            # A random delay, because most failures need a kill between two lines of code.
            time.sleep(rng.uniform(0, {"start-up": 2.0, "the first steps": 1.0, "some step": 0.5}.get(moment, 0.02)))
            process.kill()
        out, err = process.communicate(timeout=600)
        if moment is None or process.returncode == 0:
            assert process.returncode == 0, err
        else:
            assert process.returncode == -9, err
            killed[moment] += 1
        resumed += [int(line.split("resuming from step ")[1].split()[0]) for line in out.splitlines() if "resuming from" in line]
    return killed, resumed


def start(folder: Path, workdir: str, *flags: str) -> subprocess.Popen[str]:
    """Start the trainer in a new process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "tests.train.tiny", "--config", "small.py", "--workdir", workdir, *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def compare(folder: Path) -> None:
    """Assert that `killed` and `whole` have the same final bits and, except for times, the same metrics."""

    def lines(workdir: str) -> list[dict[str, Any]]:
        found = read_metrics(folder / workdir / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in TIMES} for line in found]

    assert final_state(folder / "killed") == final_state(folder / "whole")
    assert lines("killed") == lines("whole")


def prepare(folder: Path) -> None:
    """Write the config, and run `whole` without interruption."""
    (folder / "small.py").write_text(CONFIG)
    _, err = (process := start(folder, "whole")).communicate(timeout=600)
    assert process.returncode == 0, err


def main() -> None:
    """Kill, compare and record."""
    from benchmarks.timing import record

    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        rng = random.Random(0)
        moments = [*MOMENTS, *rng.choices(list(MOMENTS), k=KILLS - len(MOMENTS))]
        rng.shuffle(moments)
        killed, resumed = kill_and_resume(folder, moments, seed=0)
        compare(folder)
    assert killed.total() == KILLS, "the run ended before all kills"
    where = ", ".join(f"{count} in {moment}" for moment, count in killed.most_common())
    record(
        "kills",
        "A run killed at random moments",
        f"The run has 800 steps and writes a checkpoint every 30 steps and after each of 8 epochs. {killed.total()} SIGKILLs "
        f"({where}) were each followed by `--resume`. Restarts that found a checkpoint resumed from steps "
        f"{', '.join(map(str, resumed))}.\n\n"
        "Final parameters, statistics and optimizer state equal those of an uninterrupted run, bit for bit. "
        "`metrics.jsonl` has the same lines, except for times.",
    )


if __name__ == "__main__":
    main()
