"""ResNet-50 from Flax's own layers, for comparison: `nn.Conv`, `nn.BatchNorm`, `nn.max_pool`.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, with the stride in the 3×3 convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class PlainResNet(nn.Module):
    """Called as the library's networks: images (n, h, w, 3) to float32 logits (n, 1000)."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return the logits."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = conv(64, (7, 7), (2, 2), padding=3)(images)
        pads: Any = ((1, 1), (1, 1))  # Flax types it as text only
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), padding=pads)
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                width, strides = 64 << stage, 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, (1, 1))(x)))
                y = nn.relu(norm()(conv(width, (3, 3), (strides, strides), padding=1)(y)))
                y = norm(scale_init=nn.initializers.zeros)(conv(4 * width, (1, 1))(y))
                x = x if block else norm()(conv(4 * width, (1, 1), (strides, strides))(x))
                x = nn.relu(x + y)
        return nn.Dense(1000, dtype=jnp.float32)(x.mean((1, 2)))
