"""What commands print: tables of rich, on a terminal as wide as that is."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType


def show(renderable: RenderableType) -> None:
    """Print a table on standard output."""
    # A table read by another program, or kept in a file, is not cut to 80 columns.
    Console(width=None if sys.stdout.isatty() else 170).print(renderable)
