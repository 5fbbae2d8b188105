"""Standard streams that are closed, or whose encoding lacks some characters.

The library's commands have the same `mend_streams` in `scconv_jax/cli/console.py`. The trainer cannot import it from there: its
streams must be mended before JAX and Flax are imported, and importing any part of the library imports them.
"""

import io
import os
import sys


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


def silence(*names: str) -> None:
    """Make the streams `stdout` or `stderr` write nowhere for the rest of the process."""
    for name in names:
        setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115 see above
