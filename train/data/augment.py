"""Augmentation on the device: pure functions of a key and one image, mapped over a batch.

Crop and flip are torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()`. Differences: none.

mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. CutMix: Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019. Difference: an image is mixed with its neighbour (0
with 1, 2 with 3, … of the batch, which is shuffled), not with an image drawn from the whole batch. So no image leaves its device,
and the result is the same on any number of devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from train.config import Augment, Data
from train.data.randaugment import rand_augment

NOTHING = Augment()


def random_crop(key: Array, image: Array, padding: int) -> Array:
    """Shift `image` (h, w, c) by up to `padding` pixels each way; pixels from outside are black."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key: Array, image: Array) -> Array:
    """Mirror `image` (h, w, c) left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def make_augment(data: Data, augment: Augment = NOTHING) -> Callable[[Array, Array], Array]:
    """Return a function (keys (n,), images uint8 (n, h, w, c)) → images with the config's operations on single images."""

    def one(key: Array, image: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if data.crop_padding:
            image = random_crop(crop_key, image, data.crop_padding)
        if data.flip:
            image = random_flip(flip_key, image)
        if augment.randaugment:
            colours = jnp.broadcast_to(image, (*image.shape[:2], 3))  # a grey image has one channel
            changed = rand_augment(jax.random.fold_in(key, 2), colours, augment.randaugment, augment.randaugment_magnitude)
            image = changed[..., : image.shape[-1]]
        return image

    return jax.vmap(one)


def make_mix(augment: Augment) -> Callable[[Array, int, int], Array] | None:
    """Return a function (key, height, width) → float (height, width), or None if the config has no mixing.

    The result is the weight of each pixel's own image when neighbours are blended. Its mean is the weight of the image's label.
    """
    if not (augment.mixup or augment.cutmix):
        return None

    def mix(key: Array, height: int, width: int) -> Array:
        choice, draw = jax.random.split(key)
        kept = []
        if augment.mixup:
            kept.append(jnp.broadcast_to(jax.random.beta(draw, augment.mixup, augment.mixup), (height, width)))
        if augment.cutmix:
            kept.append(outside_box(draw, height, width, augment.cutmix))
        return jnp.stack(kept)[jax.random.randint(choice, (), 0, len(kept))]

    return mix


def outside_box(key: Array, height: int, width: int, a: float) -> Array:
    """Return 1 outside a random box and 0 inside: float (height, width).

    The box has the image's proportions, 1 - Beta(a, a) of its area before it is cut off at the edges, and a uniform centre.
    """
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, a, a))

    def outside(key: Array, size: int) -> Array:
        centre, half = jax.random.randint(key, (), 0, size), jnp.floor(side * size / 2)
        positions = jnp.arange(size)
        return (positions < centre - half) | (positions >= centre + half)

    return jnp.where(outside(row_key, height)[:, None], 1.0, outside(column_key, width)[None])
