import jax
import jax.numpy as jnp
import numpy as np

from train.augment import make_augment, normalize, random_crop, random_flip
from train.config import Data

IMAGE = jnp.arange(1, 6 * 7 * 3 + 1, dtype=jnp.uint8).reshape(6, 7, 3)
KEYS = jax.random.split(jax.random.key(0), 200)


def test_a_crop_is_a_shift_by_up_to_the_padding():
    """All 25 shifts occur, each is the image moved, and what comes in is black."""
    crops = np.asarray(jax.vmap(random_crop, (0, None, None))(KEYS, IMAGE, 2))
    assert crops.dtype == np.uint8
    padded = np.pad(np.asarray(IMAGE), ((2, 2), (2, 2), (0, 0)))
    shifts = {padded[top : top + 6, left : left + 7].tobytes() for top in range(5) for left in range(5)}
    assert {crop.tobytes() for crop in crops} == shifts


def test_a_flip_mirrors_every_other_image():
    flips = np.asarray(jax.vmap(random_flip, (0, None))(KEYS, IMAGE))
    mirrored = (flips == np.asarray(IMAGE)[:, ::-1]).all((1, 2, 3))
    same = (flips == np.asarray(IMAGE)).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert 70 < mirrored.sum() < 130


def test_only_what_the_config_asks_for():
    images = jnp.broadcast_to(IMAGE, (200, *IMAGE.shape))
    np.testing.assert_array_equal(make_augment(Data())(KEYS, images), images)
    flipped = np.asarray(make_augment(Data(flip=True))(KEYS, images))
    assert len({image.tobytes() for image in flipped}) == 2
    cropped = np.asarray(make_augment(Data(crop_padding=1))(KEYS, images))
    assert len({image.tobytes() for image in cropped}) == 9
    both = np.asarray(make_augment(Data(crop_padding=1, flip=True))(KEYS, images))
    assert len({image.tobytes() for image in both}) == 18, "crop and flip must not depend on each other"


def test_normalize():
    images = jnp.asarray([[[[0, 51, 255]]]], jnp.uint8)
    result = normalize(images, mean=(0.0, 0.1, 0.5), std=(1.0, 0.5, 0.25))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [[[[0, 0.2, 2]]]], atol=1e-7)
