"""What a bug report needs to know of a machine: versions, devices, settings of JAX, processor and memory. Nothing private."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from scconv_jax import __version__

PACKAGES = [
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "rich",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tyro",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "onnx",
    "onnxruntime",
    "tensorflow-datasets",
    "equinox",
    "torch",
]
# The plug-ins of JAX for accelerators and the libraries that they load.
PLUGINS = re.compile(r"jax[-_].*(plugin|pjrt).*|libtpu.*|nvidia[-_](cudnn|cublas|nccl|cuda[-_]runtime).*")
# Variables that change what JAX computes or where, and that hold no address, path or name by themselves.
VARIABLES = [
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "TF_GPU_ALLOCATOR",
    "TF_CPP_MIN_LOG_LEVEL",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "GLIBC_TUNABLES",
]
HIDDEN = "(not shown)"
DEVICES_SECONDS = 60.0  # a TPU needs up to half a minute to start

# Devices are asked for in a process of their own: a broken plug-in can raise, abort or wait for ever.
_ASK = """
import json, sys, jax
try:
    devices = jax.local_devices()
except Exception as error:  # a plug-in can fail in any way
    sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
kinds = {}
for device in devices:
    kinds.setdefault((device.platform, device.device_kind), []).append(device)
found = []
for (platform, kind), same in kinds.items():
    try:
        memory = (same[0].memory_stats() or {}).get("bytes_limit")
    except Exception:  # not every plug-in knows its memory
        memory = None
    found.append({"platform": platform, "kind": kind, "count": len(same), "memory_gib": memory and round(memory / 2**30, 1)})
print("\\n" + json.dumps({"backend": jax.default_backend(), "x64": bool(jax.config.jax_enable_x64), "devices": found}))
"""


def environment(*, seconds: float = DEVICES_SECONDS) -> dict[str, Any]:
    """Return versions, devices, settings, processor and memory of this machine, for a bug report.

    Paths, addresses, the user's name and values that look like secrets are left out. Of the variables `JAX_...` and `XLA_...`,
    only known ones are shown with their value.

    Args:
        seconds: Longest time to wait for JAX's devices. They are started in another process, so that a broken accelerator
            plug-in is a line of the report, not the end of this process.

    Returns:
        A dict that `json.dumps` accepts: `scconv_jax` (version), `python`, `system`, `packages` (version by name), `jax`
        (`backend`, `x64`, `devices`, and `problem` if they could not be started or JAX warned), `variables` (value by name),
        `processor` and `memory_gib`.
    """
    return {
        "scconv_jax": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": _system(),
        "packages": _packages(),
        "jax": _devices(seconds),
        "variables": _variables(),
        "processor": {"model": _processor(), "cores": os.cpu_count(), "usable_cores": _usable_cores()},
        "memory_gib": _memory(),
    }


def private(text: str) -> str:
    """Return `text` without paths, addresses, the user's name and values that look like secrets."""
    text = re.sub(r"\b[\w+.-]+://\S+", "(address)", text)
    text = re.sub(r"(?i)\b([\w-]*(?:token|secret|passw|credential|api_?key)[\w-]*\s*[=:]\s*)\S+", rf"\1{HIDDEN}", text)
    text = re.sub(r"(?<![\w.)])(?:~|[A-Za-z]:\\|/)(?=[\w.~/\\-])[^\s,;:'\"()]*", "(path)", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = ""
    return re.sub(rf"\b{re.escape(user)}\b", "(user)", text) if len(user) > 2 else text


def _packages() -> dict[str, str]:
    """Return the versions of installed packages that matter, by name."""
    installed = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and distribution.version:
            installed.setdefault(name.lower().replace("_", "-"), distribution.version)
    wanted = [name.replace("_", "-") for name in PACKAGES]
    plugins = sorted(name for name in installed if PLUGINS.fullmatch(name))
    return {name: installed[name] for name in (*wanted, *plugins) if name in installed}


def _devices(seconds: float) -> dict[str, Any]:
    """Return JAX's backend and devices, or the problem that keeps JAX from starting them."""
    variables = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with subprocess.Popen(
        [sys.executable, "-c", _ASK],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=variables,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return {"problem": f"JAX did not start its devices within {seconds:g} s"}
        except BaseException:
            _kill(process)
            raise
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    problem = private(lines[-1])[:300] if lines else ""
    if process.returncode == 0:
        found = json.loads(output.splitlines()[-1])
        return {**found, "problem": problem} if problem else found
    code = process.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {"problem": f"JAX cannot start its devices ({how}): {problem.rstrip(' :') or 'no message'}"}


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _variables() -> dict[str, str]:
    """Return the variables of the environment that change what JAX does. Unknown ones appear without their value."""
    options = {name.upper() for name in jax.config.values if name.startswith("jax_")}
    shown = {}
    for name, value in sorted(os.environ.items()):
        if name in VARIABLES or name in options:
            shown[name] = private(value)
        elif name.startswith(("JAX_", "XLA_")):
            shown[name] = HIDDEN
    return shown


def _system() -> str:
    libc = " ".join(filter(None, platform.libc_ver()))
    return ", ".join(filter(None, [platform.system(), platform.release(), platform.machine(), libc]))


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown"


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> float | None:
    """Return the memory of the machine in GiB, or None if the system does not tell."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
