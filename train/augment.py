"""Augmentation on the device: pure functions of a key and one image, and their map over a batch.

Same operations as torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()`. Differences: none.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from train.config import Data


def random_crop(key: Array, image: Array, padding: int) -> Array:
    """Shift `image` (h, w, c) by up to `padding` pixels each way; what comes in from outside is black."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key: Array, image: Array) -> Array:
    """Mirror `image` (h, w, c) left to right, or not."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def make_augment(data: Data) -> Callable[[Array, Array], Array]:
    """(keys (n,), images (n, h, w, c)) → images, with the operations that the config asks for."""

    def one(key: Array, image: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if data.crop_padding:
            image = random_crop(crop_key, image, data.crop_padding)
        if data.flip:
            image = random_flip(flip_key, image)
        return image

    return jax.vmap(one)


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 (n, h, w, c) → float32 of mean 0 and deviation 1 over the training set; `mean`, `std` are shares of 255."""
    channels = (1, 1, 1, -1)
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32).reshape(channels)) / jnp.asarray(std, jnp.float32).reshape(channels)
