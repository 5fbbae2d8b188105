import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from train.config import Data
from train.data.datasets import DATASETS, load_dataset, resize_bilinear


@pytest.fixture(scope="module")
def digits():
    return load_dataset(Data(name="digits"))


def test_digits_are_1437_and_360_in_proportion(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.abs(test - (train + test) * 360 / 1797).max() < 1
    assert digits.num_classes == 10
    assert digits.image_shape == (32, 32, 3)


def test_no_test_scan_is_a_training_scan(digits):
    """No two scans are equal, neither as 8×8 numbers nor as images."""
    from sklearn.datasets import load_digits

    scans = load_digits().data
    assert len(np.unique(scans, axis=0)) == len(scans) == 1797
    train = {image.tobytes() for image in digits.train.images}
    assert len(train) == 1437
    assert not train & {image.tobytes() for image in digits.test.images}


def test_the_split_of_digits_never_changes(digits):
    """With another release of scikit-learn or NumPy, results must stay comparable."""
    assert digits.test.labels[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]
    assert hashlib.sha256(digits.test.images.tobytes()).hexdigest()[:16] == "0071901659f01116"


def test_mean_and_deviation_are_those_of_the_training_images_alone(digits):
    pixels = digits.train.images / 255
    np.testing.assert_allclose(digits.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(digits.std, pixels.std((0, 1, 2)), rtol=1e-12)


def test_digits_are_black_and_white_the_right_way_up(digits):
    """Ink is light on black; the three channels are the same."""
    assert digits.train.images.dtype == np.uint8
    assert (digits.train.images == digits.train.images[..., :1]).all()
    assert digits.train.images[:, 0, 0].mean() < 10
    assert digits.train.images.max() == 255


@pytest.mark.parametrize("size", [8, 13, 32, 37])
def test_resize_is_that_of_pil(size):
    images = np.random.default_rng(0).uniform(0, 16, (3, 8, 8)).astype(np.float32)
    expected = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    np.testing.assert_allclose(resize_bilinear(images, size), expected, atol=1e-5)


def test_synthetic_data_is_as_large_as_asked_and_the_same_each_time():
    asked = Data(name="synthetic", image_size=19, synthetic_train=12, synthetic_test=5, synthetic_classes=3)
    dataset = load_dataset(asked)
    assert dataset.train.images.shape == (12, 19, 19, 3)
    assert dataset.test.images.shape == (5, 19, 19, 3)
    assert dataset.num_classes == 3
    assert set(dataset.train.labels.tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(load_dataset(asked).train.images, dataset.train.images)


def test_nothing_heavy_is_imported_before_it_is_used():
    """`train.prepare` and its help use these modules."""
    code = "import sys, train.data.datasets, train.data.folder, train.data.tfds; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "grain", "scconv_jax", "cv2", "PIL", "sklearn", "tensorflow_datasets"}
    assert not heavy & set(done.stdout.split())


def test_the_table_has_what_the_config_allows():
    from typing import get_args, get_type_hints

    assert set(DATASETS) == set(get_args(get_type_hints(Data)["name"]))
