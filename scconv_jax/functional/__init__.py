"""The operators as pure functions of arrays: no Flax, usable from any JAX library, under `jax.jit`, `jax.grad` and `jax.vmap`.

Maps are `(n, h, w, c)`, convolution kernels `(h, w, c_in / groups, c_out)`. Every function computes in the dtype of its input.

    self_calibration.py   self_calibration, self_calibrated_conv            Liu et al., CVPR 2020, Eqs. 3-6
    reconstruction.py     scconv, spatial_reconstruction,                   Li, Wen, He, CVPR 2023, Eqs. 1-9
                          channel_reconstruction
                          spatial_separation, channel_weights               their parts: X1 and X2, β1 and β2
    convolution.py        conv; chooses the form of each convolution: matmul, grouped, depthwise, dense
    pooling.py            avg_pool, max_pool, global_avg_pool
    resizing.py           resize_nearest

Convolution, pooling and resizing follow PyTorch's rules, since checkpoints were trained with them. JAX's functions of similar
names differ in the padding of strided convolutions, the divisor of averages over padding and the index rule of resizing.
"""

from scconv_jax.functional.convolution import conv
from scconv_jax.functional.pooling import avg_pool, global_avg_pool, max_pool
from scconv_jax.functional.reconstruction import (
    channel_reconstruction,
    channel_weights,
    scconv,
    spatial_reconstruction,
    spatial_separation,
)
from scconv_jax.functional.resizing import resize_nearest
from scconv_jax.functional.self_calibration import halves, self_calibrated_conv, self_calibration

__all__ = [
    "avg_pool",
    "channel_reconstruction",
    "channel_weights",
    "conv",
    "global_avg_pool",
    "halves",
    "max_pool",
    "resize_nearest",
    "scconv",
    "self_calibrated_conv",
    "self_calibration",
    "spatial_reconstruction",
    "spatial_separation",
]
