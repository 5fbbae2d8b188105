"""Winograd's F(2×2, 3×3): a 3×3 convolution as sixteen matmuls, with 2.25 times fewer multiplications.

Paper: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, pp. 4013-4021, Sec. 4.
https://openaccess.thecvf.com/content_cvpr_2016/html/Lavin_Fast_Algorithms_for_CVPR_2016_paper.html

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        d 4×4 tile of the padded map, every 2 pixels    g kernel    Y 2×2 pixels of the result

            1  0 -1  0          1   0   0
    Bᵀ  =   0  1  1  0    G  =  ½   ½   ½     Aᵀ  =  1  1  1  0
            0 -1  1  0          ½  -½   ½            0  1 -1 -1
            0  1  0 -1          0   0   1

The sums over channels are matmuls, one for each position in a tile. The matrices hold only 0, ±1 and ±½, so the result differs
from the plain convolution's by the rounding of a few more additions.

Differences: none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from scconv_jax.shapes import Array, Float


def winograd(x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """Convolve 3×3 with stride 1 and one pixel of padding. The result is linear in both arguments, and so are its gradients."""
    n, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padded = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
    tiles = [[padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(4)] for i in range(4)]
    of_tiles = [tile.reshape(-1, channels) for tile in _both(_data, tiles)]
    of_kernel = _both(_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])
    products = [(a @ b).reshape(n, rows, columns, -1) for a, b in zip(of_tiles, of_kernel, strict=True)]
    parts = _both(_result, [products[4 * i : 4 * i + 4] for i in range(4)])
    result = jnp.stack([jnp.stack(parts[:2], axis=3), jnp.stack(parts[2:], axis=3)], axis=2)  # (n, rows, 2, columns, 2, o)
    return result.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _both(transform: Callable[[Sequence[Array]], list[Array]], grid: Sequence[Sequence[Array]]) -> list[Array]:
    """Apply a transform to the columns, then to the rows of a grid of arrays, and return the results row by row."""
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [value for row in zip(*columns, strict=True) for value in transform(row)]


def _data(v: Sequence[Array]) -> list[Array]:
    return [v[0] - v[2], v[1] + v[2], v[2] - v[1], v[1] - v[3]]


def _kernel(v: Sequence[Array]) -> list[Array]:
    return [v[0], (v[0] + v[1] + v[2]) / 2, (v[0] - v[1] + v[2]) / 2, v[2]]


def _result(v: Sequence[Array]) -> list[Array]:
    return [v[0] + v[1] + v[2], v[1] - v[2] - v[3]]
