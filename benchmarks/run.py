"""Runs all benchmarks (`python -m benchmarks.run`) or the named ones (`python -m benchmarks.run networks`)."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import (
    device,
    endurance,
    fuzz_weights,
    index,
    inference,
    input,
    kills,
    memory,
    networks,
    operators,
    sources,
    weights,
)

BENCHMARKS: dict[str, Callable[[], object]] = {
    "device": lambda: device.main([]),
    "endurance": endurance.main,
    "fuzz_weights": fuzz_weights.main,
    "index": index.main,
    "inference": inference.main,
    "input": input.main,
    "kills": kills.main,
    "memory": memory.main,
    "networks": lambda: networks.main([]),
    "operators": operators.main,
    "sources": sources.main,
    "weights": weights.main,
}


def main(names: list[str]) -> None:
    """Run the named benchmarks; with no names, run all."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"No benchmark is called {unknown[0]!r}. Choose from {', '.join(BENCHMARKS)}.")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
