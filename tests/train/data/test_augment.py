import jax
import jax.numpy as jnp
import numpy as np

from train.config import Augment, Data
from train.data.augment import make_augment, make_mix, outside_box, random_crop, random_flip
from train.data.randaugment import rand_augment
from train.step import blend_pairs

IMAGE = jnp.arange(1, 6 * 7 * 3 + 1, dtype=jnp.uint8).reshape(6, 7, 3)
KEYS = jax.random.split(jax.random.key(0), 200)


def test_a_crop_is_a_shift_by_up_to_the_padding():
    """All 25 shifts occur, and nothing but them; pixels from outside are black."""
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


def test_randaugment_where_the_config_asks_for_it():
    images = jnp.broadcast_to(IMAGE, (8, *IMAGE.shape))
    keys = KEYS[:8]
    found = jax.jit(make_augment(Data(flip=True), Augment(randaugment=1, randaugment_magnitude=5)))(keys, images)
    flipped = jax.jit(make_augment(Data(flip=True)))(keys, images)

    def one(key, image):
        return rand_augment(jax.random.fold_in(key, 2), image, 1, 5)

    np.testing.assert_array_equal(found, jax.jit(jax.vmap(one))(keys, flipped))
    assert (found != flipped).any()


def test_neighbours_are_blended():
    x = jnp.asarray([[1.0], [3.0], [10.0], [20.0]])
    np.testing.assert_allclose(blend_pairs(x, jnp.asarray([[0.75]])), [[1.5], [2.5], [12.5], [17.5]])


def test_no_mixing_unless_asked_for():
    assert make_mix(Augment()) is None


def test_mixup_keeps_one_share_of_every_pixel():
    """Drawn from Beta(a, a): mean 1/2, variance 1 / (8 a + 4)."""
    kept = np.asarray(jax.vmap(make_mix(Augment(mixup=0.4)), (0, None, None))(KEYS, 2, 3))
    assert kept.shape == (200, 2, 3)
    assert (kept == kept[:, :1, :1]).all()
    shares = kept[:, 0, 0]
    assert abs(shares.mean() - 0.5) < 0.1
    assert abs(shares.var() - 1 / 7.2) < 0.03


def test_cutmix_cuts_boxes_with_the_images_proportions():
    keys = jax.random.split(jax.random.key(1), 2000)
    outside = np.asarray(jax.vmap(outside_box, (0, None, None, None))(keys, 20, 40, 1.0))
    assert set(np.unique(outside)) == {0, 1}
    inside = outside == 0
    heights, widths = inside.any(2).sum(1), inside.any(1).sum(1)
    np.testing.assert_array_equal(inside.sum((1, 2)), heights * widths)  # one box, filled
    whole = (heights > 0) & ~inside[:, [0, -1]].any((1, 2)) & ~inside[:, :, [0, -1]].any((1, 2))
    assert whole.sum() > 200
    assert np.abs(widths[whole] - 2 * heights[whole]).max() <= 2
    rows = inside.any(2).mean(0)
    assert rows.min() > 0.2, "boxes reach every row"


def test_mixup_and_cutmix_take_turns():
    kept = np.asarray(jax.vmap(make_mix(Augment(mixup=1.0, cutmix=1.0)), (0, None, None))(KEYS, 8, 8))
    by_mixup = (kept == kept[:, :1, :1]).all((1, 2)) & (kept[:, 0, 0] != 1)
    assert 70 < by_mixup.sum() < 130
    assert set(np.unique(kept[~by_mixup])) == {0, 1}
