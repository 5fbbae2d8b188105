"""The operators as pure functions of arrays: no Flax, usable from any JAX library, under `jax.jit`, `jax.grad`, `jax.vmap`.

Images are `(n, h, w, c)`, convolution kernels `(h, w, c_in / groups, c_out)`; every function works in the dtype of its input.

    self_calibration    self_calibration, self_calibrated_conv                  Liu et al., CVPR 2020
    reconstruction      spatial_reconstruction, channel_reconstruction          Li, Wen, He, CVPR 2023
    convolution, pooling, resizing      PyTorch's rules: conv, avg_pool, max_pool, global_avg_pool, resize_nearest

JAX has functions of the same names whose results differ from PyTorch's (padding of strided convolutions, the index rule of
nearest-neighbour resizing, what an average over padding is divided by). Checkpoints were trained with PyTorch's rules.
"""

from scconv_jax.functional.convolution import conv
from scconv_jax.functional.pooling import avg_pool, global_avg_pool, max_pool
from scconv_jax.functional.reconstruction import channel_reconstruction, spatial_reconstruction
from scconv_jax.functional.resizing import resize_nearest
from scconv_jax.functional.self_calibration import halves, self_calibrated_conv, self_calibration

__all__ = [
    "avg_pool",
    "channel_reconstruction",
    "conv",
    "global_avg_pool",
    "halves",
    "max_pool",
    "resize_nearest",
    "self_calibrated_conv",
    "self_calibration",
    "spatial_reconstruction",
]
