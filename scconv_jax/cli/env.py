"""The command `env`: what a bug report needs to know of a machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from scconv_jax.environment import environment


def add(commands: Any) -> None:
    """Add the command to the parser."""
    env = commands.add_parser(
        "env",
        help="versions, devices and settings of this machine, for a bug report",
        description="Print what a bug report needs: versions, JAX's devices and settings, processor, memory. Paths, addresses, "
        "names and secrets are left out. JAX starts its devices in another process; if that takes a minute, the report goes on.",
    )
    env.add_argument("--json", action="store_true", help="print JSON instead of lines")
    env.set_defaults(run=_env)


def _env(options: argparse.Namespace) -> None:
    found = environment()
    print(json.dumps(found, indent=1) if options.json else "\n".join(_lines(found)))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as lines of text."""
    jax, processor = found["jax"], found["processor"]
    rows = {"scconv_jax": found["scconv_jax"], "python": found["python"], **found["packages"], "system": found["system"]}
    for i, device in enumerate(jax.get("devices", [])):
        memory = f", {device['memory_gib']:g} GiB each" if device["memory_gib"] else ""
        rows["devices" if i == 0 else f"devices {i + 1}"] = f"{device['count']} × {device['platform']} ({device['kind']}){memory}"
    if "backend" in jax:
        rows["backend"] = f"{jax['backend']}, 64 bits {'on' if jax['x64'] else 'off'}"
    if "problem" in jax:
        rows["JAX says"] = jax["problem"]
    rows["processor"] = f"{processor['model']}, {processor['usable_cores']} of {processor['cores']} cores usable"
    rows["memory"] = f"{found['memory_gib']:g} GiB" if found["memory_gib"] else "unknown"
    rows |= found["variables"]
    width = max(map(len, rows)) + 1
    for name, value in rows.items():
        yield f"{name + ':':{width}} {value}"
