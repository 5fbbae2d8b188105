"""ScConv against PyTorch and against the 3×3 convolution it replaces: batch 8, float32.

PyTorch runs eagerly, in channels-last memory format, with one thread per core. "Training" is the forward and backward pass, to
the input and all parameters. Two more tables show when ScConv's group-wise and point-wise convolutions run faster as one dense
convolution, and why grouped convolutions do not use XLA's own (see `scconv_jax/functional/convolution.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jax import lax

import scconv_jax
from benchmarks.timing import alternate, milliseconds, ratio, record, table
from scconv_jax.functional.convolution import dense_blocks, reconstruction_kernel
from tests.reference import scconv

SIZES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH = 8
ROUNDS = 21


def main() -> None:
    """Measure and record."""
    tables = [
        f"Batch {BATCH}, float32; medians of {ROUNDS} alternating rounds, in ms; PyTorch eager, channels_last.",
        scconv_table(),
        dense_table(),
        grouped_table(),
    ]
    record("operators", "Operators against PyTorch and the plain convolution", "\n\n".join(tables))


def scconv_table() -> str:
    """Return the table of ScConv in JAX and in PyTorch, and of the plain 3×3 convolution."""
    rows = []
    for channels, size in SIZES:
        x, cotangent = arrays(channels, size)
        layer: Any = scconv_jax.ScConv()
        variables = layer.init(jax.random.key(0), x)
        kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
        for work, wrap, of_torch in (("inference", forward, torch_forward), ("training", both_ways, torch_both_ways)):
            oracle: Any = scconv.ScConv(channels)
            seconds = alternate(
                {
                    "jax": wrap(layer.apply, cotangent, variables, x),
                    "torch": of_torch(oracle, x, cotangent),
                    "plain": wrap(plain, cotangent, kernel, x),
                },
                ROUNDS,
            )
            rows.append(
                [
                    f"{channels} / {size}",
                    work,
                    *(milliseconds(seconds[name]) for name in ("jax", "torch", "plain")),
                    ratio(seconds["jax"], seconds["torch"]),
                    ratio(seconds["jax"], seconds["plain"]),
                ]
            )
    header = ["channels / px", "work", "ScConv, JAX", "ScConv, PyTorch", "plain 3×3, JAX", "JAX / PyTorch", "ScConv / plain 3×3"]
    return "## ScConv\n\n" + table(header, rows)


def dense_table() -> str:
    """Return the table of a CRU's GWC + PWC1 (α = 1/2, r = 2, g = 2) as one convolution with an assembled kernel, and as two."""

    def dense(kernels: Any, x: jax.Array) -> jax.Array:
        gwc, pwc1 = kernels
        kernel = reconstruction_kernel(gwc, pwc1, conv_groups=2)
        return scconv_jax.functional.conv(x, kernel, padding=1)

    def separate(kernels: Any, x: jax.Array) -> jax.Array:
        gwc, pwc1 = kernels
        return scconv_jax.functional.conv(x, gwc, padding=1, groups=2) + scconv_jax.functional.conv(x, pwc1)

    rows = []
    for channels, size in SIZES:
        squeezed = channels // 4
        x, _ = arrays(squeezed, size)
        _, cotangent = arrays(channels, size)
        gwc, pwc1 = jax.random.split(jax.random.key(1))
        shapes = (3, 3, squeezed // 2, channels), (1, 1, squeezed, channels)
        kernels = jax.random.normal(gwc, shapes[0]), jax.random.normal(pwc1, shapes[1])
        for work, wrap in (("inference", forward), ("training", both_ways)):
            functions = {"dense": wrap(dense, cotangent, kernels, x), "separate": wrap(separate, cotangent, kernels, x)}
            seconds = alternate(functions, ROUNDS)
            times = (milliseconds(seconds[name]) for name in ("dense", "separate"))
            used = "dense" if dense_blocks(2, squeezed) == 1 else "separate"
            rows.append([f"{channels} / {size}", work, *times, ratio(seconds["dense"], seconds["separate"]), used])
    header = ["channels / px", "work", "dense", "separate", "dense / separate", "used"]
    return "## Group-wise and point-wise convolution of the CRU\n\n" + table(header, rows)


def grouped_table() -> str:
    """Return the table of grouped 3×3 convolutions in this library and in XLA."""
    rows = []
    for channels, size, groups in ((128, 14, 4), (128, 14, 32), (128, 14, 128)):
        x, cotangent = arrays(channels, size)
        kernel = jax.random.normal(jax.random.key(1), (3, 3, channels // groups, channels))

        def ours(kernel: jax.Array, x: jax.Array, groups: int = groups) -> jax.Array:
            return scconv_jax.functional.conv(x, kernel, padding=1, groups=groups)

        def native(kernel: jax.Array, x: jax.Array, groups: int = groups) -> jax.Array:
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers, feature_group_count=groups
            )

        for work, wrap in (("inference", forward), ("training", both_ways)):
            functions = {"ours": wrap(ours, cotangent, kernel, x), "native": wrap(native, cotangent, kernel, x)}
            seconds = alternate(functions, 5)
            rows.append(
                [
                    f"{channels} / {size}",
                    str(groups),
                    work,
                    milliseconds(seconds["ours"]),
                    milliseconds(seconds["native"]),
                    ratio(seconds["ours"], seconds["native"]),
                ]
            )
    header = ["channels / px", "groups", "work", "ours", "XLA", "ours / XLA"]
    return "## Grouped 3×3 convolutions\n\n" + table(header, rows)


def plain(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Return the plain 3×3 convolution."""
    return scconv_jax.functional.conv(x, kernel, padding=1)


def arrays(channels: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Return an input `(n, h, w, c)` and a cotangent of its shape."""
    keys = jax.random.split(jax.random.key(2))
    x, cotangent = (jax.random.normal(key, (BATCH, size, size, channels)) for key in keys)
    return x, cotangent


def forward(function: Callable[..., jax.Array], cotangent: jax.Array, weights: Any, x: jax.Array) -> Callable[[], object]:
    """Return a call of the compiled function."""
    del cotangent
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(weights, x))


def both_ways(function: Callable[..., jax.Array], cotangent: jax.Array, weights: Any, x: jax.Array) -> Callable[[], object]:
    """Return a call of the compiled function and its gradients."""

    def step(weights: Any, x: jax.Array) -> Any:
        y, pull_back = jax.vjp(function, weights, x)
        return y, pull_back(cotangent)

    compiled = jax.jit(step)
    return lambda: jax.block_until_ready(compiled(weights, x))


def torch_forward(module: Any, x: jax.Array, cotangent: jax.Array) -> Callable[[], object]:
    """Return a call of PyTorch's inference."""
    del cotangent
    module = module.to(memory_format=torch.channels_last).eval()
    images = channels_last(x)

    def run() -> None:
        with torch.inference_mode():
            module(images)

    return run


def torch_both_ways(module: Any, x: jax.Array, cotangent: jax.Array) -> Callable[[], object]:
    """Return a call of PyTorch's forward and backward pass."""
    module = module.to(memory_format=torch.channels_last).train()
    images, gradient = channels_last(x).requires_grad_(), channels_last(cotangent)

    def run() -> None:
        module.zero_grad()
        images.grad = None
        module(images).backward(gradient)

    return run


def channels_last(x: jax.Array) -> torch.Tensor:
    """Return `(n, h, w, c)` as a PyTorch tensor `(n, c, h, w)` in channels-last memory format."""
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
