"""The progress bar and the lines above it."""

import sys
from typing import Self

from tqdm import tqdm


class Progress:
    """A progress bar over all images of the run, with images/s and remaining time. Without a terminal, it prints only lines."""

    def __init__(self, total_steps: int, first_step: int, batch_size: int, *, shown: bool = True) -> None:
        self._batch_size = batch_size
        self._said: set[str] = set()
        self._bar = tqdm(
            total=total_steps * batch_size,
            initial=first_step * batch_size,
            unit="img",
            unit_scale=True,
            desc="compiling the step",
            dynamic_ncols=True,
            leave=False,
            disable=not (shown and sys.stderr.isatty()),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def restart_clock(self) -> None:
        """Exclude the time so far (a compilation) from images/s and the remaining time."""
        self._bar.unpause()

    def advance(self, where: str) -> None:
        """Count one step and show `where` the run is before the bar."""
        self._bar.set_description_str(where, refresh=False)
        self._bar.update(self._batch_size)

    def say(self, line: str, *, once: bool = False) -> None:
        """Print a line above the bar. With `once`, a repeated line is printed only the first time."""
        if once and line in self._said:
            return
        self._said.add(line)
        with self._bar.external_write_mode(file=sys.stdout):
            print(line, flush=True)
