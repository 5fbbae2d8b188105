"""Time and memory to convert SCNet-101 from PyTorch's two formats to safetensors: `python -m benchmarks.weights`.

Each conversion runs in its own process. First the library alone: read, `from_torch`, `save`, and the same with `torch.load` in
place of our reader. Then the command `python -m scconv_jax convert`, which also recognises the network. Memory is the highest
resident size less the size before the conversion, in multiples of the source file's size.
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
from scconv_jax import create_model, to_torch

MODEL = "scnet101"
ROUNDS = 5
LIMITS = (1.2, 2.5)  # seconds, and multiples of the file's size

MEASURE = """
import re, time
from pathlib import Path

def resident(which):
    return int(re.search(which + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def reset():
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    return resident("VmRSS")
"""

CONVERT = (
    MEASURE
    + """
import json, sys
from functools import partial
reader, source, target = sys.argv[1:]
if reader == "ours, torch absent":
    sys.modules["torch"] = None
import jax, jax.numpy as jnp
import scconv_jax
from scconv_jax import weights
model = scconv_jax.create_model("scnet101")
template = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3)))

def read():
    if reader != "torch.load":
        return weights.read(source).tensors
    import torch
    return torch.load(source, weights_only=True, map_location="cpu")

before = reset()
times = [time.perf_counter()]
tensors = read()
times.append(time.perf_counter())
variables = scconv_jax.from_torch(tensors, template)
times.append(time.perf_counter())
scconv_jax.save(target, variables, {"model": "scnet101"})
times.append(time.perf_counter())
seconds = [b - a for a, b in zip(times, times[1:])]
print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before}))
"""
)

COMMAND = (
    "import time; started = time.perf_counter()\n"
    + MEASURE
    + """
import contextlib, io, json, sys
from scconv_jax.cli import main
before, imported = reset(), time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["convert", sys.argv[1], "--out", sys.argv[2], "--force"]) == 0
assert "torch" not in sys.modules
seconds = [imported - started, time.perf_counter() - imported]
print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before}))
"""
)


def make(folder: Path) -> dict[str, Path]:
    """Write a state dict of SCNet-101 with random values in both of PyTorch's formats."""
    model = create_model(MODEL)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), shapes)
    entries = {key: torch.from_numpy(value) for key, value in to_torch(variables).items()}
    paths = {kind: folder / f"{kind}.pth" for kind in ("zip", "legacy")}
    for kind, path in paths.items():
        torch.save(entries, path, _use_new_zipfile_serialization=kind == "zip")
    return paths


def run(code: str, *arguments: str | Path) -> dict:
    """Run a program, and return the JSON that it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def medians(results: list[dict]) -> list[float]:
    """Return the median of each phase."""
    return [statistics.median(phase) for phase in zip(*(result["seconds"] for result in results), strict=True)]


def main() -> None:
    """Measure and record; exit with an error if a limit is exceeded."""
    library, command, slowest, largest, size = [], [], 0.0, 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "x.safetensors"
        for kind, path in make(Path(name)).items():
            size = path.stat().st_size
            found: dict[str, list[dict]] = {
                "ours, torch absent": [],
                "ours, torch installed": [],
                "torch.load": [],
                "command": [],
            }
            for _ in range(ROUNDS):
                for reader, results in found.items():
                    results.append(run(COMMAND, path, target) if reader == "command" else run(CONVERT, reader, path, target))
            for reader, results in found.items():
                seconds = medians(results)
                memory = max(result["bytes"] for result in results) / size
                if reader != "torch.load":
                    largest = max(largest, memory)
                if reader == "command":
                    slowest = max(slowest, seconds[1])
                    command.append([kind, *(f"{value:.2f}" for value in seconds), f"{memory:.2f}"])
                else:
                    library.append([kind, reader, *(f"{value:.2f}" for value in (*seconds, sum(seconds))), f"{memory:.2f}"])
    text = (
        f"SCNet-101, a file of {size / 1e6:.0f} MB, each time in its own process; medians of {ROUNDS}, and the highest memory. "
        "Our reading includes the SHA-256 of the file, the checksums of the archive and the search for non-finite values; "
        "that of `torch.load` includes the import of torch, and none of these.\n\n"
        + table(["format", "reader", "read, s", "from_torch, s", "save, s", "together, s", "peak memory ÷ file"], library)
        + "\n\n`python -m scconv_jax convert`, with torch installed. The conversion includes recognising the network and the "
        "SHA-256 of both files.\n\n"
        + table(["format", "import of JAX, Flax and the library, s", "conversion, s", "peak memory ÷ file"], command)
    )
    record("weights", "Converting a checkpoint", text)
    if slowest > LIMITS[0] or largest > LIMITS[1]:
        sys.exit(f"{slowest:.2f} s and {largest:.2f} times the file; the limits are {LIMITS[0]} s and {LIMITS[1]} times.")


if __name__ == "__main__":
    main()
