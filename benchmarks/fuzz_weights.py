"""Thousands of damaged and hostile files of weights: `python -m benchmarks.fuzz_weights [FILES]`.

Each must end in arrays or in one `WeightsError`, within seconds of processor time and a bounded memory, and nothing may be run.
File number n is the same in every run. Worker processes read the files, so that a crash would be seen. Any other outcome is
printed with the file's number, and the exit code is 1.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import pickletools
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import record, table
from scconv_jax import weights
from scconv_jax.weights import state_dicts
from scconv_jax.weights.files import WeightsError
from tests import weight_files as made
from tests.weights.test_weights_hostile import BOMBS, OPCODES

FILES = 10_000
BATCH = 1000
SECONDS = 10  # of processor time for one file, whatever else the machine does
MEMORY = 1 << 30  # bytes, beyond those of a worker before its first file

ARRAYS = {
    "conv1.weight": np.arange(96, dtype=np.float32).reshape(4, 3, 4, 2),
    "bn1.running_mean": np.ones(4),
    "bn1.num_batches_tracked": np.array(3),
    "fc.bias": np.ones(3, np.float16),
}
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def state_dict() -> bytes:
    """Return the opcodes of a valid state dict."""
    return state_dicts.write_pickle(ARRAYS)


def checkpoint() -> bytes:
    """Return the opcodes of a training script's checkpoint."""
    inner = state_dict()[2:-1]
    return made.whole(
        made.dictionary([("epoch", made.text(3)), ("state_dict", inner), ("args", made.text({"lr": [0.1, None, "x"]}))])
    )


def container(kind: str, pickled: bytes) -> bytes:
    """Return a file of either format around a pickle, with correct checksums."""
    storages = [np.ascontiguousarray(array).tobytes() for array in ARRAYS.values()]
    if kind == "zip":
        return made.zip_file(pickled, storages)
    return made.legacy_file(made.as_legacy(pickled), storages, [array.size for array in ARRAYS.values()])


def safetensors() -> bytes:
    """Return a valid safetensors file."""
    header: dict = {"__metadata__": {"model": "x"}}
    data = b""
    for name in ("conv1.weight", "fc.bias"):
        dtype = {"float32": "F32", "float16": "F16"}[ARRAYS[name].dtype.name]
        header[name] = {"dtype": dtype, "shape": ARRAYS[name].shape, "data_offsets": [len(data), len(data) + ARRAYS[name].nbytes]}
        data += ARRAYS[name].tobytes()
    return made.safetensors_file(header, data)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return the content with a few changes: bits, bytes, numbers, cuts, repetitions, copied pieces."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([1, 2, 4, 8, 64]))
        match chance.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at:end] = chance.randbytes(end - at)
            case 2:
                size = chance.choice([1, 2, 4, 8])
                data[at : at + size] = (chance.choice(NUMBERS) % 256**size).to_bytes(size, chance.choice(["little", "big"]))
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end] * chance.choice([1, 2, 1000])
            case 5 if chance.random() < 0.2:
                del data[at:]
            case 6:
                other = chance.randrange(len(data) + 1)
                data[at:end] = data[other : other + 8]
            case _:
                data[at:at] = chance.choice(OPCODES)
    return bytes(data)


def rearranged(pickled: bytes, chance: random.Random, canary: Path) -> bytes:
    """Return a pickle with some opcodes left out, repeated, or followed by others."""
    places = [place for _, _, place in pickletools.genops(pickled) if place is not None]
    operations = [pickled[a:b] for a, b in itertools.pairwise([*places, len(pickled)])]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(1, len(operations) - 1)
        match chance.randrange(3):
            case 0:
                operations[at] = b""
            case 1:
                operations[at] += chance.choice(operations[1:-1])
            case _:
                operations[at] += opcodes(chance, canary, 3)
    return b"".join(operations)


def opcodes(chance: random.Random, canary: Path, most: int) -> bytes:
    """Return random opcodes, names and pieces of tensors, among them calls that would make a file."""
    payloads = list(made.live_payloads(canary).values())
    pieces = []
    for _ in range(chance.randrange(1, most)):
        match chance.randrange(6):
            case 0:
                pieces.append(chance.choice(OPCODES))
            case 1:
                pieces.append(made.named(chance.choice(made.NAMES)))
            case 2:
                pieces.append(made.tensor(made.storage(str(chance.randrange(3)), count=96), chance.choice([0, 1, -1, 2**40])))
            case 3:
                pieces.append(made.text(chance.choice(["state_dict", "w", 3, (2, 2), [], {}, 0.5, 2**70])))
            case 4:
                pieces.append(
                    chance.choice([b"(", b"t", b"R", b"}", b"u", b"s", b"b", b"\x81", b"q\0", b"h\0", b"\x85", b"\x86"])
                )
            case _ if chance.random() < 0.3:
                pieces.append(chance.choice(payloads))
    return b"".join(pieces)


def hostile(number: int, canary: Path) -> tuple[str, bytes]:
    """Return how file `number` was made, and its content."""
    bombs = list(BOMBS)
    if number < 2 * len(bombs):
        kind = ("zip", "legacy")[number % 2]
        return f"bombs, {kind}", container(kind, b"\x80\x02" + BOMBS[bombs[number // 2]]() + b".")
    chance = random.Random(number)
    kind = chance.choice(["zip", "legacy"])
    pickled = chance.choice([state_dict, checkpoint])()
    match number % 7:
        case 0:
            return f"file mutated, {kind}", mutated(container(kind, pickled), chance)
        case 1:
            return f"pickle mutated, {kind}", container(kind, mutated(pickled, chance))
        case 2 | 3:
            return f"pickle rearranged, {kind}", container(kind, rearranged(pickled, chance, canary))
        case 4:
            return f"random opcodes, {kind}", container(kind, made.whole(opcodes(chance, canary, 40)))
        case 5:
            parts = [
                made.MAGIC,
                made.VERSION,
                made.MACHINE,
                made.as_legacy(pickled),
                made.whole(made.text([str(i) for i in range(len(ARRAYS))])),
            ]
            at = chance.randrange(len(parts))
            parts[at] = rearranged(parts[at], chance, canary)
            storages = [array.size.to_bytes(8, "little") + array.tobytes() for array in ARRAYS.values()]
            return "part rearranged, legacy", b"".join(parts + storages)
        case _:
            return "file mutated, safetensors", mutated(safetensors(), chance)


class TookTooLongError(BaseException):
    """Not an `Exception`, so that no handler on the way catches it."""


def work(first: int, last: int) -> None:
    """Read the files with these numbers, and print a line of JSON for each."""

    def stop(*_: object) -> None:
        raise TookTooLongError

    signal.signal(signal.SIGPROF, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as name:
        path, canary = Path(name) / "x.pth", Path(name) / "canary"
        for number in range(first, last):
            kind, content = hostile(number, canary)
            path.write_bytes(content)
            print(json.dumps({"number": number, "begun": True}), flush=True)
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                weights.read(path)
                end = "read"
            except WeightsError:
                end = "refused"
            except BaseException as error:
                end = f"{type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            left = sorted(found.name for found in Path(name).iterdir())
            if left != ["x.pth"]:
                end = f"it left {left}"
            seconds = time.process_time() - start
            print(json.dumps({"number": number, "kind": kind, "end": end, "seconds": seconds}), flush=True)


def main(files: int = FILES) -> int:
    """Read all files, record the counts, and return the exit code."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    slowest: collections.Counter = collections.Counter()
    failures = []
    for first in range(0, files, BATCH):
        last = min(files, first + BATCH)
        while first < last:
            command = [sys.executable, "-m", "benchmarks.fuzz_weights", "--work", str(first), str(last)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            for line in lines:
                if "end" in line:
                    counts[line["kind"]][line["end"] if line["end"] in ("read", "refused") else "other"] += 1
                    slowest[line["kind"]] = max(slowest[line["kind"]], line["seconds"])
                    if line["end"] not in ("read", "refused"):
                        failures.append(f"file {line['number']} ({line['kind']}): {line['end']}")
            if done.returncode == 0:
                break
            first = lines[-1]["number"] + 1 if lines else last
            failures.append(f"the worker died with {done.returncode} at file {first - 1}: {done.stderr[-500:]}")
    rows = [
        [kind, *(f"{found[end]:,}" for end in ("read", "refused", "other")), f"{slowest[kind]:.2f}"]
        for kind, found in sorted(counts.items())
    ]
    text = (
        f"{files:,} files; each must be read, or refused with a `WeightsError`, within {SECONDS} s of processor time and "
        f"{MEMORY >> 20} MB, and nothing may be run.\n\n"
        + table(["files", "read", "refused", "anything else", "slowest, s"], rows)
    )
    record("fuzz_weights", "Damaged and hostile files of weights", "\n\n".join([text, *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main(*map(int, sys.argv[1:2])))
