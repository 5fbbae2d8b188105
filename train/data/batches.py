"""Makes the batches of a run in order, reads ahead in threads, and transfers batches to the device.

A batch is a function of (seed, step) alone, whatever the number of hosts, threads or restarts: the global batch of a step is
a fixed list of images, and each host reads its part. So a checkpoint's step is also the position in the data, and a resumed run
continues with exactly the next batch.
"""

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

import numpy as np

from train.config import ConfigError

Batch = dict[str, np.ndarray]

IMAGES_PER_TASK = 16
"""Images per task of a thread. Few, so that all threads work on the next batch and memory stays small."""
LOOK_SECONDS = 1.0
"""Interval between two looks at `stopping` while no batch arrives."""
CLOSE_SECONDS = 5.0
"""Time for reads to end. A read from a network disk that hangs never ends."""
READER, FEEDER = "read images", "batches to the device"
"""Names of threads."""
POLL_SECONDS = 1e-3
"""Interval between two checks whether the device is idle, during the wait for a batch."""


class StoppedError(Exception):
    """A signal has come while the next batch was expected."""


class UnreadableImageError(Exception):
    """An image cannot be decoded. The source has already counted it."""


class Source(Protocol):
    """Images with random access."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, 3) of every image."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, key: tuple[int, ...], out: np.ndarray) -> int:
        """Write an image to `out`, uint8 (h, w, 3), contiguous, and return its label; all randomness comes from `key`.

        Raises:
            UnreadableImageError: the image cannot be read; a second call raises it again.
        """
        ...


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    first_step: int,
    threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch, None, None]:
    """Yield this host's part of the training batches from step `first_step` on, without end.

    Each epoch is shuffled anew and has `len(source) // batch_size` full batches. Host h of H reads the positions
    `[h * b / H, (h + 1) * b / H)` of each batch. An unreadable image is replaced by the next readable one of the source.

    `batch_size` counts the images of all hosts together. With `threads` 0, nothing is read ahead.

    Yields:
        `{"image": uint8 (b / H, h, w, 3), "label": int32 (b / H,)}`
    """
    import grain

    order: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle()

    def read(step: int, position: int, out: np.ndarray) -> dict[str, int]:
        epoch, batch = divmod(step, len(source) // batch_size)
        index = order[epoch * len(source) + batch * batch_size + position]
        for offset in range(len(source)):
            with contextlib.suppress(UnreadableImageError):
                return {"label": source.load((index + offset) % len(source), (seed, step, position), out)}
        raise ConfigError("no image of the training set can be read")

    positions = _positions(batch_size, process_index, process_count)
    return _read_ahead(read, source.image_shape, {"label": np.int32}, itertools.count(first_step), positions, threads)


def eval_batches(
    source: Source, batch_size: int, *, threads: int, process_index: int = 0, process_count: int = 1
) -> Generator[Batch, None, None]:
    """Yield this host's part of all images, each once, in order. Every host gets the same number of batches.

    Unreadable images, and the padding of the last batch, are black and have weight 0.

    Yields:
        `{"image": uint8 (b / H, h, w, 3), "label": int32 (b / H,), "weight": float32 (b / H,)}`
    """

    def read(step: int, position: int, out: np.ndarray) -> dict[str, float]:
        index = step * batch_size + position
        if index < len(source):
            with contextlib.suppress(UnreadableImageError):
                return {"label": source.load(index, (), out), "weight": 1}
        out[...] = 0
        return {"label": 0, "weight": 0}

    positions = _positions(batch_size, process_index, process_count)
    steps = range(-(-len(source) // batch_size))
    return _read_ahead(read, source.image_shape, {"label": np.int32, "weight": np.float32}, steps, positions, threads)


def _positions(batch_size: int, process_index: int, process_count: int) -> range:
    """Return the positions in the global batch that a host reads."""
    if batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} images does not divide over {process_count} hosts")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _read_ahead(
    read: Callable[[int, int, np.ndarray], dict[str, Any]],
    image_shape: tuple[int, int, int],
    fields: dict[str, Any],
    steps: Iterable[int],
    positions: range,
    threads: int,
) -> Generator[Batch, None, None]:
    """Yield the batches of `steps`, which threads read ahead.

    `read`: (step, position, out) → a value for each of the `fields` (name → dtype). It writes the image to `out`.
    """
    size = len(positions)
    tasks = [range(start, min(start + IMAGES_PER_TASK, size)) for start in range(0, size, IMAGES_PER_TASK)]
    ahead = max(2, -(-2 * threads // len(tasks)))  # two batches, or two tasks for each thread

    def new_batch() -> Batch:
        return {"image": np.empty((size, *image_shape), np.uint8)} | {key: np.empty(size, fields[key]) for key in fields}

    closed = threading.Event()

    def fill(batch: Batch, step: int, task: range) -> None:
        for i in task:
            if closed.is_set():
                return
            for key, value in read(step, positions[i], batch["image"][i]).items():
                batch[key][i] = value

    if not threads:
        for step in steps:
            batch = new_batch()
            fill(batch, step, range(size))
            yield batch
        return

    steps, begun = iter(steps), deque[tuple[Batch, list[Future[None]]]]()
    pool = ThreadPoolExecutor(threads, READER)
    try:
        while True:
            for step in itertools.islice(steps, ahead - len(begun)):
                batch = new_batch()
                begun.append((batch, [pool.submit(fill, batch, step, task) for task in tasks]))
            if not begun:
                return
            batch, futures = begun.popleft()
            for future in futures:
                future.result()
            yield batch
    finally:
        closed.set()
        pool.shutdown(cancel_futures=True)


class DevicePrefetcher(Iterator[Any]):
    """Iterator over `put(batch)`: a thread transfers up to two batches ahead while the device computes."""

    def __init__(
        self, batches: Iterator[Batch], put: Callable[[Batch], Any], stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """Start the thread. Once `stopping()`, a request for a batch raises a `StoppedError`."""
        self.waited = 0.0
        """Seconds that the device has been idle because no batch was ready."""
        self._batches, self._put, self._stopping = batches, put, stopping
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name=FEEDER, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all threads and drop the batches that were read ahead. A read that hangs is left behind."""
        self._stop.set()
        end = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.01)

    def __next__(self) -> Any:
        return self.take(lambda: True)

    def take(self, idle: Callable[[], bool]) -> Any:
        """Return the next batch. The time spent here while `idle()`, when the device has no work, is added to `waited`."""
        found = None
        while found is None:
            if self._stopping():
                raise StoppedError
            start, lost = time.perf_counter(), idle()
            with contextlib.suppress(queue.Empty):
                found = self._queue.get(timeout=LOOK_SECONDS if lost else POLL_SECONDS)
            if lost:
                self.waited += time.perf_counter() - start
        batch, error = found
        if error is not None:
            self._queue.put((None, error))  # so that the next call raises it too
            raise error
        return batch

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                self._queue.put((self._put(next(self._batches)), None))
        except BaseException as error:  # StopIteration too: `take` raises it
            self._queue.put((None, error))
        finally:  # here, not in `__exit__`: a read may hang for longer than that waits
            if isinstance(self._batches, Generator):
                self._batches.close()


def reads_hang() -> bool:
    """Return whether threads still read images, though nobody waits for them. Python's exit would wait for ever."""
    return any(thread.name.startswith((READER, FEEDER)) for thread in threading.enumerate())
