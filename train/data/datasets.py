"""Data sets by name: training and test source, classes, and mean and standard deviation of the pixels."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from train.config import ConfigError, Data
from train.data.batches import Source
from train.data.folder import open_folder
from train.data.index import FolderRecords
from train.data.tfds import TfdsRecords, open_tfds


@dataclass(frozen=True)
class ArraySource:
    """Images in memory: uint8 (n, h, w, 3) and int32 (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, 3)."""
        return self.images.shape[1:]

    def load(self, index: int, key: tuple[int, ...], out: np.ndarray) -> int:
        """Write the image to `out`, uint8 (h, w, 3), and return its label. `key` is ignored."""
        del key
        out[...] = self.images[index]
        return self.labels[index]


@dataclass(frozen=True)
class Dataset:
    """Disjoint training and test images, their classes, and the mean and standard deviation of their pixels."""

    train: Source
    test: Source
    classes: tuple[str, ...]
    """Name of each label."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels in 0..1."""
    resize: int
    """Shorter side of a test image before its middle is cut out, in pixels."""
    notes: tuple[str, ...] = ()
    """What was left out, divided or assumed: lines for the user."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, 3)."""
        return self.train.image_shape


def load_dataset(data: Data, *, seed: int = 0, testing: bool = False) -> Dataset:
    """Load the data set that the config names.

    Args:
        data: The config.
        seed: Seed of `data.val_fraction`.
        testing: The network is already trained, so training images may be missing.

    Raises:
        ConfigError: The data set is missing or invalid.
        ModuleNotFoundError: A package is missing; the message names the extra that installs it.
    """
    if data.val_fraction and data.name != "folder":
        raise ConfigError(
            f"data.val_fraction {data.val_fraction:g} divides a folder of image files; data.name is {data.name}"
            + (", so use --data.train-split train[:80%] --data.test-split train[80%:]" if data.name == "tfds" else "")
        )
    options = {"seed": seed, "testing": testing} if data.name in ("folder", "tfds") else {}
    dataset = DATASETS[data.name](data, **options)
    if dataset.num_classes < 2:
        raise ConfigError(f"data.dir: {data.dir} has a single class, {dataset.classes[0]}: a network needs two classes or more")
    return replace(dataset, mean=data.mean or dataset.mean, std=data.std or dataset.std)


def load_digits(data: Data) -> Dataset:
    """Load scikit-learn's 1,797 scans of handwritten digits, 8×8 pixels (UCI ML repository, "optdigits").

    1,437 are for training and 360 for testing, every digit in proportion. The split is the same for every seed, and no scan
    occurs twice. The scans are enlarged to `image_size` bilinearly and repeated to `channels`.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'scconv-jax[train]'") from error

    scans, labels = datasets.load_digits(return_X_y=True)
    train, test = model_selection.train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    grey = resize_bilinear(scans.reshape(-1, 8, 8) / 16, data.image_size)
    images = np.repeat(np.round(255 * grey).astype(np.uint8)[..., None], data.channels, axis=-1)
    labels = labels.astype(np.int32)
    return _from_arrays(ArraySource(images[train], labels[train]), ArraySource(images[test], labels[test]), 10)


def load_synthetic(data: Data) -> Dataset:
    """Make images of noise on one random 4×4 pattern per class, in any size, for smoke tests and benchmarks."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(64, 192, (data.synthetic_classes, 4, 4, data.channels))
    shape = (data.image_size, data.image_size, data.channels)

    def make(count: int) -> ArraySource:
        labels = (np.arange(count) % data.synthetic_classes).astype(np.int32)
        images = np.empty((count, *shape), np.uint8)
        for index, label in enumerate(labels):  # one at a time: ImageNet-size floats would not fit in memory
            pattern = resize_bilinear(patterns[label].transpose(2, 0, 1), data.image_size).transpose(1, 2, 0)
            images[index] = np.clip(pattern + rng.normal(0, 24, shape), 0, 255)
        return ArraySource(images, labels)

    return _from_arrays(make(data.synthetic_train), make(data.synthetic_test), data.synthetic_classes)


def load_folder(data: Data, *, seed: int = 0, testing: bool = False) -> Dataset:
    """Load the image files in `data.dir`: `train/CLASS/IMAGE` and `val/CLASS/IMAGE`."""
    train, test, notes = open_folder(data.dir, val_fraction=data.val_fraction, seed=seed, testing=testing)
    return replace(_from_files(data, train, test), notes=tuple(notes))


def load_tfds(data: Data, *, seed: int = 0, testing: bool = False) -> Dataset:
    """Load a data set of TensorFlow Datasets in `data.dir`. `seed` is ignored."""
    del seed
    return _from_files(data, *open_tfds(data.dir, data.tfds_name, data.train_split, data.test_split, testing=testing))


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "synthetic": load_synthetic,
    "folder": load_folder,
    "tfds": load_tfds,
}


def resize_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge (n, h, w) to (n, size, size) as PIL does: pixel centres at half integers, edges repeated."""

    def weights(old: int) -> np.ndarray:
        position = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))

    return weights(images.shape[1]) @ images @ weights(images.shape[2]).T


def _from_arrays(train: ArraySource, test: ArraySource, num_classes: int) -> Dataset:
    pixels = train.images.reshape(-1, train.image_shape[-1]) / 255
    classes = tuple(map(str, range(num_classes)))
    mean, std = (tuple(values.tolist()) for values in (pixels.mean(0), pixels.std(0)))
    return Dataset(train, test, classes, mean, std, resize=train.image_shape[0])  # which leaves such an image as it is


def _from_files(data: Data, train: FolderRecords | TfdsRecords, test: FolderRecords | TfdsRecords) -> Dataset:
    try:
        import scconv_jax
        from train.data.records import make_sources
    except ImportError as error:
        raise ModuleNotFoundError(
            f"image files need {error.name or error}, which is not installed: pip install 'scconv-jax[train]'"
        ) from error
    imagenet = scconv_jax.images.Preparation  # its defaults suit pretrained networks, and photographs in general
    mean, std = imagenet.mean, imagenet.std
    if data.channels == 1:  # as timm does
        mean, std = ((sum(values) / 3,) for values in (mean, std))
    resize = data.resize or scconv_jax.images.resize_for(data.image_size)
    return Dataset(*make_sources(data, resize, train, test), train.classes, mean, std, resize)
