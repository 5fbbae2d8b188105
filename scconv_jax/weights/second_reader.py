"""A second opinion on PyTorch's files: where PyTorch is installed, its own `weights_only` loader must read the same.

It is asked last, when our reader has passed the whole file, and in a process of its own, whose time and memory are limited. For
what a file may make it do no list of our own could foresee: a set of tuples within tuples is a few bytes, and takes it for ever
to hash; an archive that two readers unpack differently can hold for it what ours never saw.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.formats import Source

SAFE = (2, 10)
"""The first PyTorch whose loader is known to run no code (CVE-2025-32434) and to keep to its memory (CVE-2026-24747)."""

SECONDS = 120  # for the whole process, PyTorch's import from a slow disk among it; its loader has limits of its own


class Opinion(NamedTuple):
    """What PyTorch said of a file, for people, and how long it took."""

    text: str
    """That it reads the same, that it refuses the file, or why it was not asked; empty for files of other formats."""
    seconds: float


def confirm(source: Source) -> Opinion:
    """Let PyTorch read a file of its own, and compare.

    Args:
        source: what our reader made of the file.

    Raises:
        WeightsError: PyTorch reads other entries, shapes, dtypes or bits. Where it reads nothing, our reader's word stands.
    """
    started = time.perf_counter()
    return Opinion(_asked(source), time.perf_counter() - started)


def _asked(source: Source) -> str:
    if not source.format.startswith("torch"):
        return ""
    ours: dict[str, Any] = source.tensors or traverse_util.flatten_dict(source.variables or {}, sep="/")
    version = _version()
    if not version:
        return "not installed"
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or tuple(map(int, parts.groups())) < SAFE:
        return f"not asked: {version} is not safe, 2.10 or later is"
    theirs = _read(source)
    if isinstance(theirs, str):
        return f"{version} {theirs}"
    for name in {**ours, **theirs}:
        if name not in ours or theirs.get(name) != _described(ours[name]):
            raise WeightsError(
                f"{source.path} cannot be used: PyTorch {version} reads {name!r:.100} otherwise than we do. The file is made to "
                "look different to different readers, or one of them is wrong."
            )
    return f"{version} reads the same"


def _version() -> str:
    """The version of PyTorch that is installed, which is not imported for it; empty where there is none."""
    try:
        return importlib.metadata.version("torch") if importlib.util.find_spec("torch") else ""
    except importlib.metadata.PackageNotFoundError:  # something else that is called torch
        return ""


def _described(array: np.ndarray) -> list:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [array.dtype.name, list(array.shape), digest]


def _read(source: Source) -> dict[str, list] | str:
    """Entries as PyTorch has them, `[dtype, shape, SHA-256]` by name, or what became of the attempt."""
    script = Path(__file__).with_name("torch_process.py")
    request = json.dumps({"path": str(source.path.absolute()), "wrappers": source.wrappers, "bytes": source.bytes})
    # One thread: threads take memory by their number. An empty folder of the path would mean the one that we are in.
    limits = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    environment = os.environ | limits | {"PYTHONPATH": os.pathsep.join(folders)}
    try:
        # -P: nothing that lies in the folder of the script, or in the one we are in, is taken for a module.
        done = subprocess.run(
            [sys.executable or "python3", "-P", str(script), request],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
            timeout=SECONDS, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "could not be started"
    lines = done.stdout.splitlines()
    if "ready" not in lines:
        return "could not be started"
    try:
        found = json.loads(lines[-1])
    except ValueError:
        return "did not get through it within its limits"
    return f"refuses it, with {found['refused']}" if "refused" in found else found["entries"]
