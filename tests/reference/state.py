"""A random state for an oracle, with nothing left at the value that it is born with.

A fresh BatchNorm (scale 1, bias 0, mean 0, variance 1) hides swapped and forgotten entries; so each gets a value of its
own, in a range that keeps activations near 1.
"""

import numpy as np
import torch
from torch import nn


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Draws all parameters and buffers of `module` anew, in place, and returns it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for name, value in module.state_dict().items():  # shares memory with the module
        kind = name.rsplit(".", 1)[-1]
        if kind == "num_batches_tracked":
            value.fill_(torch.randint(1, 10_000, (), generator=generator))
        elif kind == "running_mean":
            value.copy_(0.3 * normal(value))
        elif kind == "running_var":
            value.copy_(uniform(value, 0.5, 2.0))
        elif value.ndim in (2, 4):  # a kernel: unit variance in, unit variance out
            value.copy_(normal(value) * (1 / np.sqrt(value[0].numel())))
        elif kind in ("weight", "gamma"):  # a norm's scale, a fifth of them negative
            sign = torch.where(uniform(value, 0, 1) < 0.2, -1.0, 1.0).to(value.dtype)
            value.copy_(uniform(value, 0.5, 1.5) * sign)
        else:
            value.copy_(0.3 * normal(value))
    return module


def random_images(shape: tuple[int, int, int, int], seed: int, dtype: np.dtype | type = np.float64) -> np.ndarray:
    """Standard normal maps `(n, h, w, c)`."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def nchw(x: np.ndarray) -> torch.Tensor:
    """`(n, h, w, c)` array → `(n, c, h, w)` tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """`(n, c, h, w)` tensor → `(n, h, w, c)` array."""
    return np.moveaxis(x.detach().numpy(), 1, -1)
