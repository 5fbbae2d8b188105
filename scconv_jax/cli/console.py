"""Standard streams: tables of rich, and streams that are closed or whose encoding lacks some characters."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console, RenderableType


def show(renderable: RenderableType) -> None:
    """Print a table, as wide as the terminal."""
    # In a file or a pipe, rich would cut a table to 80 columns.
    Console(width=None if sys.stdout.isatty() else 170).print(renderable)


def mend_streams() -> None:
    """Make closed streams write nowhere, and print `?` for characters that an encoding lacks.

    Otherwise the next file that is opened takes the number of a closed stream, and what libraries print goes into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
