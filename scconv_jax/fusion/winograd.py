"""Winograd's form of a 3×3 convolution: 36 multiplications for 16 outputs instead of 144.

Paper: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, https://arxiv.org/abs/1509.09308

    F(4×4, 3×3)    Y = Aᵀ [ (G K Gᵀ) · (Bᵀ X B) ] A     X a tile of 6×6 pixels, K the kernel, Y a tile of 4×4 outputs

The products, summed over the input channels, are 36 matmuls. `winograd_kernel` computes (G K Gᵀ)ᵀ, which inference needs once.

Differences: the polynomials are interpolated at 0, ±2/3, ±3/2 and infinity, not at 0, ±1, ±2 and infinity. This halves the
rounding error in float32.
"""

from __future__ import annotations

import functools
import operator
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax import lax

from scconv_jax.functional.checks import check_maps
from scconv_jax.functional.convolution import native_conv
from scconv_jax.functional.platforms import by_platform
from scconv_jax.functional.symbolic import is_symbolic
from scconv_jax.shapes import Array, Float

TILE = 4  # outputs along each side of a tile
_SIZE = TILE + 2  # pixels along each side of a tile
_POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))  # and infinity


def _vandermonde(columns: int) -> np.ndarray:
    """Return the powers 0, 1, ... of the points, and of infinity."""
    rows = [[float(point**power) for power in range(columns)] for point in _POINTS]
    return np.array([*rows, [0.0] * (columns - 1) + [1.0]])


# The larger factor of each row of Bᵀ goes to G, so that the tiles keep the magnitude of the maps.
_B = np.linalg.inv(_vandermonde(_SIZE)).T
_SCALE = 2.0 ** np.round(np.log2(np.abs(_B).max(axis=1, keepdims=True)))
_B, _G, _A = _B / _SCALE, _vandermonde(3) * _SCALE, _vandermonde(TILE).T
_B[np.abs(_B) < 1e-12] = 0.0


def winograd_kernel(kernel: np.ndarray) -> np.ndarray:
    """Return (G K Gᵀ)ᵀ, `(6, 6, i, o)`, for a 3×3 kernel `(3, 3, i, o)`; the dtype stays. Columns come before rows."""
    wide = np.einsum("ai,bj,ijco->baco", _G, _G, np.asarray(kernel, np.float64), optimize=True)
    return wide.astype(kernel.dtype)


def plain_kernel(transformed: Float[Array, "6 6 i o"]) -> Float[Array, "3 3 i o"]:
    """Return the 3×3 kernel of a transformed one, up to rounding: the inverse of `winograd_kernel`."""
    inverse = jnp.asarray(np.linalg.pinv(_G), transformed.dtype)
    return jnp.einsum("ia,jb,baco->ijco", inverse, inverse, transformed)


def winograd_product(transformed: Float[Array, "6 6 i o"], x: Float[Array, "n h w i"]) -> Float[Array, "n h w o"]:
    """Convolve maps with a transformed 3×3 kernel, with stride 1 and one pixel of padding."""
    n, height, width, channels = x.shape
    down, across = -(-height // TILE), -(-width // TILE)
    features = transformed.shape[-1]
    margins = ((0, 0, 0), (1, down * TILE + 1 - height, 0), (1, across * TILE + 1 - width, 0), (0, 0, 0))
    x = lax.pad(x, np.zeros((), x.dtype), margins)

    # Rows first, then columns. Between the stages XLA must store the maps: fused, it would compute the first stage six times.
    last = (down - 1) * TILE + 1
    rows = [lax.slice(x, (0, i, 0, 0), (n, i + last, x.shape[2], channels), (1, TILE, 1, 1)) for i in range(_SIZE)]
    x = lax.optimization_barrier(_combine(_B, rows))
    last = (across - 1) * TILE + 1
    columns = [lax.slice_in_dim(x, j, j + last, TILE, axis=3) for j in range(_SIZE)]
    tiles = lax.optimization_barrier(_combine(_B, columns).reshape(_SIZE**2, -1, channels))

    kernels = transformed.reshape(_SIZE**2, channels, features)  # columns first, as the tiles: another order would be a copy
    y = lax.dot_general(tiles, kernels, (((2,), (1,)), ((0,), (0,))))
    y = lax.optimization_barrier(y).reshape(_SIZE, _SIZE, n, down, across, features)  # column, row, ...

    y = lax.optimization_barrier(_combine(_A, list(y)))
    y = _combine(_A, [y[:, i] for i in range(_SIZE)])  # row, column, ...
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(n, down * TILE, across * TILE, features)
    return lax.slice(y, (0, 0, 0, 0), (n, height, width, features))


def _combine(matrix: np.ndarray, parts: list[Array]) -> Array:
    """Return the product of a matrix and a stack of arrays, without multiplying by 0 and 1."""

    def term(factor: float, part: Array) -> Array:
        return part if factor == 1 else part * np.asarray(factor, part.dtype)

    sums = ([term(factor, part) for factor, part in zip(row, parts, strict=True) if factor] for row in matrix)
    return jnp.stack([functools.reduce(operator.add, terms) for terms in sums])


def suits_winograd(shape: tuple[int, ...], strides: int, padding: int, dilation: int, groups: int, size: int) -> bool:
    """Return whether a convolution whose kernel is constant is faster in Winograd's form on CPU (docs/performance.md).

    Args:
        shape: Shape of the kernel, `(kh, kw, c / groups, o)`.
        strides: Step of the window.
        padding: Zeros added on each side.
        dilation: Distance between two taps of the kernel.
        groups: Number of groups of channels.
        size: The smaller of the map's height and width. A map below 7 px has few pixels for 36 matmuls.
    """
    plain = (*shape[:2], strides, padding, dilation, groups) == (3, 3, 1, 1, 1, 1)
    return plain and size >= 7 and min(shape[2:]) >= 32


def winograd_conv(x: Float[Array, "n h w c"], transformed: Float[Array, "6 6 c o"]) -> Float[Array, "n h w o"]:
    """Convolve 3×3 with stride 1 and a padding of one pixel, given the kernel from `winograd_kernel`, `(6, 6, c, o)`.

    Programs for accelerators, and those of symbolic sizes, restore the kernel and use XLA's own convolution.
    """
    check_maps("winograd_conv", x)
    if is_symbolic(*x.shape[1:3]):
        return _restored_conv(transformed, x)
    return by_platform(winograd_product, _restored_conv, transformed, x)


def _restored_conv(transformed: Array, x: Array) -> Array:
    return native_conv(plain_kernel(transformed), x, strides=1, padding=1, dilation=1, groups=1)
