"""Prints rich's tables to standard output."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType


def show(renderable: RenderableType) -> None:
    """Print a table, as wide as the terminal."""
    # In a file or a pipe, rich would cut a table to 80 columns.
    Console(width=None if sys.stdout.isatty() else 170).print(renderable)
