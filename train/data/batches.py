"""The order in which a run sees its images, and their way to the device.

Each batch is a function of (seed, step) alone, whatever the number of hosts, threads or restarts: the global batch of
a step is a fixed list of images, of which each host reads its part. So the step of a checkpoint is the position in the data,
and a resumed run continues with exactly the batch that was next. Grain reads ahead, in threads.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import grain
import numpy as np

from train.config import ConfigError

Batch = dict[str, np.ndarray]

PIECE = 16
"""Images that one thread reads at a time: few, so that the first batch is soon there and memory small."""

LOOK_SECONDS = 1e-3
"""Between two looks at whether the device still has work, while a batch is waited for."""

ENDLESS = 2**48
"""More steps than any run has."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded. The source that raises it has counted it."""


class Records(Protocol):
    """Encoded images at random access."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of an image file, and its label."""
        ...

    def name(self, index: int) -> str:
        """What a person finds the image by."""
        ...


class Source(Protocol):
    """Images at random access."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, 3) of every image."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, key: tuple[int, ...], out: np.ndarray) -> int:
        """Write an image to `out`, uint8 (h, w, 3), contiguous, and return its label; all randomness comes from `key`.

        Raises:
            UnreadableImageError: and so it does each time.
        """
        ...


FIELDS = {"label": np.int32, "weight": np.float32}
"""What a batch holds beside its images."""


class Batches(Iterator[Batch]):
    """Batches of this host, read ahead in threads, `PIECE` images at a time."""

    def __init__(
        self,
        load: Callable[[int, int, np.ndarray], tuple[Any, ...]],
        image_shape: tuple[int, int, int],
        fields: tuple[str, ...],
        *,
        positions: range,
        first: int,
        last: int,
        threads: int,
    ) -> None:
        """Batches `first` to `last` - 1; `load(step, position, out)` writes one image of the batch and gives its `fields`."""
        per_batch = -(-len(positions) // PIECE)
        ahead = max(2 * per_batch, 2 * threads) if threads else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._per_batch, self._shared = per_batch, _Pieces(load, image_shape, fields, positions, last * per_batch)
        self._pieces: Any = iter(grain.MapDataset.source(self._shared).to_iter_dataset(options))
        self._pieces.set_state({"next_index": first * per_batch})

    def __next__(self) -> Batch:
        steps = [next(self._pieces) for _ in range(self._per_batch)]
        return self._shared.take(steps[0])

    def close(self) -> None:
        """Stop reading ahead."""
        self._pieces.close()


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    first_step: int,
    threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless training batches from step `first_step` on, this host's part of each.

    Each epoch is shuffled anew and gives `len(source) // batch_size` whole batches. Of the batch of a step, host h of H takes
    positions `[h * b / H, (h + 1) * b / H)`. In the place of an unreadable image stands the next readable one of the source.

    Args:
        source: the images of all hosts.
        batch_size: images per step, all hosts together; divisible by `process_count`.
        seed: of the run.
        first_step: the first batch to give.
        threads: that read; 0 reads only when asked.
        process_index: this host.
        process_count: all hosts.

    Returns:
        `{"image": uint8 (b / H, h, w, 3), "label": int32 (b / H,)}` at each step.
    """
    positions = _positions(batch_size, process_index, process_count)
    order: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle()

    def load(step: int, position: int, out: np.ndarray) -> tuple[int]:
        epoch, batch = divmod(step, len(source) // batch_size)
        index = order[epoch * len(source) + batch * batch_size + position]
        for substitute in range(len(source)):
            try:
                return (source.load((index + substitute) % len(source), (seed, step, position), out),)
            except UnreadableImageError:
                continue
        raise ConfigError("not one image of the training set can be read")

    return Batches(load, source.image_shape, ("label",), positions=positions, first=first_step, last=ENDLESS, threads=threads)


def eval_batches(source: Source, batch_size: int, *, threads: int, process_index: int = 0, process_count: int = 1) -> Batches:
    """Every image once, over all hosts together, in order; as many batches on every host.

    Arguments are those of `train_batches`. What fills up the last batch, and what stands for an unreadable image, has weight 0.

    Returns:
        `{"image": uint8 (b / H, h, w, 3), "label": int32 (b / H,), "weight": float32 (b / H,)}` at each step.
    """
    positions = _positions(batch_size, process_index, process_count)

    def load(step: int, position: int, out: np.ndarray) -> tuple[int, float]:
        index = step * batch_size + position
        if index < len(source):
            with contextlib.suppress(UnreadableImageError):
                return source.load(index, (), out), 1.0
        out[...] = 0
        return 0, 0.0

    steps = -(-len(source) // batch_size)
    return Batches(load, source.image_shape, tuple(FIELDS), positions=positions, first=0, last=steps, threads=threads)


class Staged(Iterator[Any]):
    """What `put` makes of each batch, two ahead of use: a thread of its own calls it while the step before runs."""

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], Any], ahead: int = 2) -> None:
        self.waited = 0.0
        """Seconds that went by for want of a batch, so far."""
        self._batches, self._put = batches, put
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches to the device", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Any:
        return self.take(lambda: True)

    def take(self, idle: Callable[[], bool]) -> Any:
        """The next batch. `waited` grows by the time until it is there, as far as `idle()`: the device has nothing to do."""
        found = None
        while found is None:
            start, lost = time.perf_counter(), idle()
            with contextlib.suppress(queue.Empty):
                found = self._queue.get(timeout=None if lost else LOOK_SECONDS)
            if lost:
                self.waited += time.perf_counter() - start
        batch, error = found
        if error is not None:
            self._queue.put((None, error))  # and so it ends for whoever asks again
            raise error
        return batch

    def close(self) -> None:
        """End the threads; what was read ahead is dropped."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def _fill(self) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put((self._put(next(self._batches)), None))
            except BaseException as error:  # StopIteration too: it belongs to the reader
                self._queue.put((None, error))
                return


class _Pieces:
    """Batches in pieces of `PIECE` images, for Grain to read at random access, in threads: they fill the batch's arrays."""

    def __init__(
        self,
        load: Callable[[int, int, np.ndarray], tuple[Any, ...]],
        image_shape: tuple[int, int, int],
        fields: tuple[str, ...],
        positions: range,
        count: int,
    ) -> None:
        self._load, self._image_shape, self._positions, self._count = load, image_shape, positions, count
        self._fields = {key: FIELDS[key] for key in fields}
        self._per_batch = -(-len(positions) // PIECE)
        self._batches: dict[int, Batch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> int:
        """Read a piece; returns the step that it belongs to."""
        step, piece = divmod(index, self._per_batch)
        size = len(self._positions)
        with self._lock:
            if step not in self._batches:
                fields = {key: np.empty(size, dtype) for key, dtype in self._fields.items()}
                self._batches[step] = {"image": np.empty((size, *self._image_shape), np.uint8), **fields}
            batch = self._batches[step]
        for i in range(piece * PIECE, min((piece + 1) * PIECE, size)):
            values = self._load(step, self._positions[i], batch["image"][i])
            for key, value in zip(self._fields, values, strict=True):
                batch[key][i] = value
        return step

    def take(self, step: int) -> Batch:
        """The batch of a step, all pieces of which have been read."""
        with self._lock:
            return self._batches.pop(step)


def _positions(batch_size: int, process_index: int, process_count: int) -> range:
    """The places in the whole batch that a host reads."""
    if batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} images does not divide over {process_count} hosts")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)
