"""The command line: `python -m scconv_jax COMMAND`, also installed as `scconv-jax`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scconv_jax import __version__
from scconv_jax.cli import convert, env, explain, export, predict, summary, verify
from scconv_jax.cli.console import mend_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 if not all is well (a difference, a skipped image), or 2 for bad input."""
    mend_streams()
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, MemoryError, ModuleNotFoundError) as error:
        print(f"scconv-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scconv-jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scconv-jax", description="Tools for the networks of scconv_jax.")
    parser.add_argument("--version", action="version", version=f"scconv_jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (summary, convert, verify, predict, explain, export, env):
        command.add(commands)
    return parser
