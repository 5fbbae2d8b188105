"""The least that a training step must read and write on a GPU, counted from the shapes of a network.

`benchmarks.compiled` records it beside what the compiled program reads and writes.

Convolutions are library calls on GPUs: each reads and writes whole arrays. The count assumes that XLA joins everything between
two calls as well as is possible. Read and written then are, at least, in maps of a module's size:

    convolution      3 input, 3 output    forward, gradient to the kernel, gradient to the input (not for the first one)
    batch norm       8                    forward: statistics 1, normalisation 2; backward: sums 2, gradient 3
    group norm, SRU  8                    the same, gate and reconstruction included
    shortcut         2                    forward 1, backward 1
    calibration      6                    the input of the sigmoid: forward 1, backward 2; its gradient: 3
    CRU's sum        11                   forward: means 2, sum 3; backward: sums 3, gradients 3

SCNet's two 1×1 convolutions of one input read it once. GWC and PWC1 of a CRU are one convolution. Left out are the max-pool, the
head, parameters, optimizer and statistics, which are small. The norms of the stem and of shortcuts count like all others. Their
results need not be stored, so for the networks recorded the count is 2 % too high.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax.layers.core import BatchNorm, Conv
from scconv_jax.layers.reconstruction import CRU, SRU
from scconv_jax.layers.self_calibrated import SelfCalibration
from scconv_jax.layers.variants import CRUSplit
from scconv_jax.models.blocks import ResidualBlock

BYTES = 2  # of a bfloat16


def floor_bytes(model: nn.Module, images: int, size: int = 224) -> int:
    """Return the least bytes that a training step of `images` images in bfloat16 reads and writes."""
    values = 0

    def count(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal values
        result = next_call(*args, **kwargs)
        if context.method_name == "__call__":
            values += accesses(context.module, jnp.shape(args[0]), jnp.shape(jax.tree.leaves(result)[-1]))
        return result

    with nn.intercept_methods(count):
        x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return BYTES * images * values


def accesses(module: nn.Module, read: tuple[int, ...], written: tuple[int, ...]) -> int:
    """Return the values that a module itself reads and writes for one image, without the modules inside it."""
    inputs, outputs = math.prod(read), math.prod(written)
    match module:
        case Conv():
            if read[-1] == 3:  # images need no gradient
                return 2 * (inputs + outputs)
            return 3 * outputs + (0 if module.name == "conv1_b" else 3 * inputs)
        case BatchNorm() | SRU():
            return 8 * outputs
        case SelfCalibration():
            return 6 * inputs
        case CRU():
            channels, features = read[-1], written[-1]
            split = CRUSplit(channels, features, module.alpha, module.squeeze, module.conv_groups)
            _, _, upper_squeezed, lower_squeezed = split.widths()
            squeezes = channels + upper_squeezed + lower_squeezed
            gwc_and_pwc1, pwc2 = upper_squeezed + features, lower_squeezed + features - lower_squeezed
            return 3 * outputs // features * (squeezes + gwc_and_pwc1 + pwc2) + 11 * outputs
        case ResidualBlock():
            return 2 * outputs
        case _:
            return 0
