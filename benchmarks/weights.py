"""Time and memory of converting SCNet-101 from PyTorch's two formats to safetensors: `python -m benchmarks.weights`.

Each conversion is a process of its own: read, `from_torch`, `save`. Memory is the highest that was resident, less what the
process had before it began, in parts of the source file's size. Beside ours, the same with `torch.load` in place of our reader.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.timing import record, table
from scconv_jax import create_model, to_torch, weights
from scconv_jax.weights.second_reader import confirm

MODEL = "scnet101"
ROUNDS = 3
LIMITS = (2.0, 2.5)  # seconds, and parts of the file's size

CONVERT = """
import json, re, sys, time
from functools import partial
from pathlib import Path
reader, source, target = sys.argv[1:]
if reader == "ours, torch absent":
    sys.modules["torch"] = None
import jax, jax.numpy as jnp
import scconv_jax
from scconv_jax import weights
model = scconv_jax.create_model("scnet101")
template = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3)))

def resident(which):
    return int(re.search(which + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def read():
    if reader != "torch.load":
        return weights.read(source).tensors
    import torch
    return torch.load(source, weights_only=True, map_location="cpu")

Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
before = resident("VmRSS")
times = [time.perf_counter()]
tensors = read()
times.append(time.perf_counter())
variables = scconv_jax.from_torch(tensors, template)
times.append(time.perf_counter())
scconv_jax.save(target, variables, {"model": "scnet101"})
times.append(time.perf_counter())
seconds = [b - a for a, b in zip(times, times[1:])]
print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before, "torch": sys.modules.get("torch") is not None}))
"""


def make(folder: Path) -> dict[str, Path]:
    """A state dict of SCNet-101 with random numbers, in both of PyTorch's formats."""
    model = create_model(MODEL)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    numbers = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape, np.float32), shapes)
    entries = {name: torch.from_numpy(value) for name, value in to_torch(variables).items()}
    paths = {kind: folder / f"{kind}.pth" for kind in ("zip", "legacy")}
    for kind, path in paths.items():
        torch.save(entries, path, _use_new_zipfile_serialization=kind == "zip")
    return paths


def main() -> None:
    """Measure, and record the result; fails where a limit is passed."""
    rows = []
    worst = [0.0, 0.0]
    size = 0
    waited = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, path in make(folder).items():
            size = path.stat().st_size
            source = weights.read(path)
            for _ in range(ROUNDS):
                opinion = confirm(source)
                assert opinion.text.endswith("reads the same"), opinion
                waited.append(opinion.seconds)
            found: dict[str, list[dict]] = {"ours, torch absent": [], "ours, torch installed": [], "torch.load": []}
            for _ in range(ROUNDS):
                for reader, results in found.items():
                    command = [sys.executable, "-c", CONVERT, reader, str(path), str(folder / "x.safetensors")]
                    results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            for reader, results in found.items():
                phases = [statistics.median(result["seconds"][i] for result in results) for i in range(3)]
                total = statistics.median(sum(result["seconds"]) for result in results)
                memory = max(result["bytes"] for result in results) / size
                rows.append([kind, reader, *(f"{seconds:.2f}" for seconds in (*phases, total)), f"{memory:.2f}"])
                if reader != "torch.load":
                    worst = [max(worst[0], total), max(worst[1], memory)]
    header = ["format", "reader", "read, s", "from_torch, s", "save, s", "together, s", "peak memory ÷ file"]
    text = (
        f"SCNet-101, a file of {size / 1e6:.0f} MB, in a process of its own each; medians of {ROUNDS}, the highest memory. Our "
        "reading includes the SHA-256 of the file, the checksums of the archive and the search for values that are not finite; "
        "that of `torch.load` the import of torch, and none of these. Beyond that, `convert` and `load_model` wait "
        f"{statistics.median(waited):.1f} s for torch's own loader, which reads the file in a process of its own.\n\n"
        + table(header, rows)
    )
    record("weights", "Converting a checkpoint", text)
    if worst[0] > LIMITS[0] or worst[1] > LIMITS[1]:
        sys.exit(f"{worst[0]:.2f} s and {worst[1]:.2f} times the file; the limits are {LIMITS[0]} s and {LIMITS[1]} times.")


if __name__ == "__main__":
    main()
