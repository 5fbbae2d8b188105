"""Answers about many images: files are decoded in threads while the network computes, with one compiled shape."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np

from scconv_jax import images as image_files
from scconv_jax.images import SUFFIXES, ImageError, OneImage
from scconv_jax.inference.run import BATCH_SIZE, Answer, TrainedModel, load_run

READ_AHEAD = 2
"""Batches that are decoded before the network needs them."""


class Prediction(NamedTuple):
    """The answers about one image."""

    image: str
    """Path of the file, or `images[3]` for an image that is no file."""
    answers: tuple[Answer, ...]
    """The most probable classes, the most probable first; none if the image cannot be read."""
    error: str = ""
    """Why the image cannot be read; empty if it can."""


def predict(
    images: OneImage | Iterable[OneImage],
    weights: str | os.PathLike[str] | TrainedModel,
    *,
    top: int = 5,
    checkpoint: str | int = "best",
    batch_size: int = BATCH_SIZE,
) -> list[Prediction]:
    """Return the classes that a trained network finds in images.

        for image, answers, error in scconv_jax.predict("photos", "runs/digits"):
            print(image, error or answers[0].name)

    Args:
        images: One image or several: paths of files or of folders (all images in them, sorted by path), bytes of image files, PIL
            images, or uint8 RGB arrays (h, w, 3) of any size. An array (n, h, w, 3) is n images.
        weights: The folder of a training run, a file or name of weights, as for `load_run`, or what `load_run` returns.
        top: Number of classes for each image; all classes if the network has fewer.
        checkpoint: Which checkpoint of a run to take: "best", "latest" or a step.
        batch_size: Images that are computed at once.

    Returns:
        A prediction for each image. Those of an image that cannot be read have an `error` and no answers.

    Raises:
        WeightsError: The weights cannot be read.
        ConversionError: The weights fit no network here.
        TypeError: An image has another type, such as an array of floats.
        ValueError: There is no image, a folder has none, a path does not exist, or `top` or `batch_size` is below 1.
    """
    batch: list[Any] = [images] if image_files.is_single(images) else list(cast("Iterable[OneImage]", images))
    paths = all(isinstance(image, str | os.PathLike) for image in batch)
    found: list[Any] = list(list_images(batch)) if paths else batch
    trained = weights if isinstance(weights, TrainedModel) else load_run(weights, checkpoint=checkpoint)
    return list(predict_each(trained, found, top=top, batch_size=batch_size))


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the image files that paths name, each once: the files, and the images in the folders, sorted by path.

    Hidden files and folders are left out. A file that is named itself may have any suffix. A link to nothing is listed too, as
    a file that cannot be read.

    Raises:
        ValueError: A path does not exist, a folder holds no image, or there is no path.
    """
    found: dict[str, None] = {}
    for path in [os.fspath(path) for path in paths]:
        if os.path.isdir(path):
            inside = _images_in(path)
            if not inside:
                raise ValueError(f"The folder {path} holds no image files (.jpg, .png and the like), and its folders hold none.")
            found |= dict.fromkeys(inside)
        elif os.path.lexists(path):
            found[path] = None
        else:
            raise ValueError(f"There is no file or folder {path}.")
    if not found:
        raise ValueError("There is no image: give files or folders.")
    return list(found)


def _images_in(folder: str) -> list[str]:
    found = []
    for inside, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        paths = (os.path.join(inside, name) for name in names if name[0] != "." and name.lower().endswith(SUFFIXES))
        found += (path for path in paths if os.path.isfile(path) or not os.path.exists(path))  # no pipes, which would wait
    return sorted(found)


def predict_each(
    trained: TrainedModel, images: Iterable[OneImage], *, top: int = 5, batch_size: int = BATCH_SIZE, threads: int | None = None
) -> Iterator[Prediction]:
    """Yield a prediction for each image, in their order, as batches are computed.

    Args:
        trained: The network.
        images: Images, or paths of files.
        top: Number of classes for each image.
        batch_size: Images that are computed at once. A smaller last batch is filled up, so that the network is compiled once.
        threads: Threads that decode images. If None, one per core.
    """
    for name, number in (("top", top), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} must be an integer of 1 or more.")
    images = list(images)
    if not images:
        raise ValueError("images is empty: there is nothing to predict.")
    size = min(batch_size, len(images))
    computing: deque[tuple[Any, list[tuple[str, str]]]] = deque()

    def read(number: int, image: OneImage) -> tuple[str, np.ndarray | str]:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{number}]"
        try:
            return name, image_files.pixels(image, trained.preparation, name)
        except ImageError as error:
            return name, str(error.__cause__ or error)
        except OSError as error:
            return name, error.strerror or str(error)

    def finish() -> Iterator[Prediction]:
        result, rows = computing.popleft()
        count = sum(not error for _, error in rows)
        answers = iter(trained.finish(np.asarray(result[0]), np.asarray(result[1]), count) if result else ())
        for name, error in rows:
            yield Prediction(name, (), error) if error else Prediction(name, next(answers))

    with ThreadPoolExecutor(threads or _cores(), "decode images") as pool:
        try:
            for batch in _batches(_in_order(pool, read, images, READ_AHEAD * size), size):
                decoded = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
                result = trained.start(decoded, top, size) if decoded else None
                computing.append((result, [(name, found if isinstance(found, str) else "") for name, found in batch]))
                if len(computing) > 1:
                    yield from finish()
            while computing:
                yield from finish()
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ThreadPoolExecutor, read: Any, images: Iterable[Any], ahead: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yield the results of `read` in the order of the images, of which `ahead` are begun before they are needed."""
    waiting = iter(enumerate(images))
    begun: deque[Future[Any]] = deque(pool.submit(read, *item) for item in islice(waiting, ahead))
    while begun:
        yield begun.popleft().result()
        begun.extend(pool.submit(read, *item) for item in islice(waiting, 1))


def _batches(found: Iterable[tuple[str, np.ndarray | str]], size: int) -> Iterator[list[tuple[str, np.ndarray | str]]]:
    """Yield lists with `size` images that could be read, and the rest. The others stand where they were."""
    batch: list[tuple[str, np.ndarray | str]] = []
    count = 0
    for item in found:
        batch.append(item)
        count += isinstance(item[1], np.ndarray)
        if count == size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
