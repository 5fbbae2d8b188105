"""What every network here is made of: `Conv`, `BatchNorm`, `ConvNorm`, `Dense`, with PyTorch's numbers.

Every layer is called `layer(x, train=train)`, so that a network can take any of them where it takes one; those whose result does
not depend on training (`Conv`, `Dense`) may be called without. Parameters are float32; `dtype` is what is computed in.

Differences from Flax's layers of the same names: padding is a number, not "SAME"; `BatchNorm` stores the unbiased running
variance, as PyTorch does; `Conv` computes a 1×1 as a matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from scconv_jax import functional as F
from scconv_jax.functional.checks import check_divides, check_whole
from scconv_jax.shapes import Array, Float

Factory = Callable[..., nn.Module]  # a module class, or a functools.partial of one
Dtype = Any

# He et al., ICCV 2015, fan-out and ReLU gain, not truncated: `torch.nn.init.kaiming_normal_(mode="fan_out")`.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Convolution, `(n, h, w, c)` to `(n, p, q, features)`, with `torch.nn.Conv2d`'s rules (see `functional.conv`).

    Attributes:
        features: channels of the output.
        kernel_size: height and width of the kernel.
        strides: step of the window.
        padding: zeros on each side. For an odd kernel, `dilation * (kernel_size // 2)` keeps the size.
        dilation: distance between the kernel's taps.
        groups: the channels are cut into this many runs, each convolved by itself.
        use_bias: whether to add a bias, `(features,)`.
        dtype: of the computation; where not given, what `x` and the parameters promote to.
        kernel_init: initialiser of the kernel.

    Raises:
        ValueError: if the channels of input or output are not a multiple of `groups`, or a value is no whole number.
    """

    features: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Dtype | None = None
    kernel_init: nn.initializers.Initializer = kaiming_normal

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n p q d"]:
        """Convolve; `train` changes nothing."""
        del train
        check_whole(features=self.features, kernel_size=self.kernel_size, strides=self.strides, dilation=self.dilation)
        channels = x.shape[-1]
        check_divides("groups", self.groups, "the channels of input and output", channels, self.features)
        shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = F.conv(x, kernel, strides=self.strides, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return x if bias is None else x + jnp.broadcast_to(bias, x.shape)


def conv1x1(features: int, **options: Any) -> Conv:
    """Make a 1×1 convolution."""
    return Conv(features, 1, **options)


def conv3x3(features: int, *, strides: int = 1, dilation: int = 1, groups: int = 1, **options: Any) -> Conv:
    """Make the 3×3 convolution that keeps the size (at stride 1): what every operator here stands in for."""
    return Conv(features, 3, strides=strides, padding=dilation, dilation=dilation, groups=groups, **options)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with `torch.nn.BatchNorm2d`'s numbers.

    Statistics are taken in float32 (float64 for float64 input), whatever the dtype of the computation. The running variance
    is the unbiased one, n / (n - 1), as in PyTorch; what normalises in training is the biased one.

    Attributes:
        momentum: what the running statistics keep at each step (PyTorch's `momentum` is one minus this).
        epsilon: added to the variance.
        dtype: of the result; where not given, that of `x`.
        axis_name: mapped axis (or axes) over which to take the statistics, PyTorch's `SyncBatchNorm`; where not given,
            each device takes its own.

    Raises:
        ValueError: in training, if a channel has only one value, whose variance says nothing.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    axis_name: str | tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], *, train: bool) -> Float[Array, "*batch c"]:
        """Normalise by the batch's statistics and update the running ones (`train`), or by the running ones."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        dtype = self.dtype or x.dtype
        x = x.astype(jnp.promote_types(jnp.promote_types(x.dtype, dtype), jnp.float32))
        scale, bias = scale.astype(x.dtype), bias.astype(x.dtype)

        if train:
            axis_name = None if self.is_initializing() else self.axis_name
            mean, var, count = moments(x, axis_name)
            if not self.is_initializing():
                unbiased = lax.stop_gradient(var) * (count / (count - 1))
                self._keep(running_mean, lax.stop_gradient(mean))
                self._keep(running_var, unbiased)
        else:
            mean, var = running_mean.value.astype(x.dtype), running_var.value.astype(x.dtype)

        # One multiply-add per element; the rest is per channel.
        factor = scale * lax.rsqrt(var + self.epsilon)
        offset = bias - mean * factor
        return (x * _over_channels(factor, x) + _over_channels(offset, x)).astype(dtype)

    def _keep(self, running: nn.Variable, new: Float[Array, " c"]) -> None:
        old = running.value
        running.value = (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype)


def moments(
    x: Float[Array, "*batch c"], axis_name: str | tuple[str, ...] | None = None
) -> tuple[Float[Array, " c"], Float[Array, " c"], int]:
    """Mean, biased variance and count of values per channel, over all devices of `axis_name` where one is given.

    Raises:
        ValueError: if there is only one value per channel.
    """
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
    if count < 2:
        raise ValueError(
            f"BatchNorm in training needs more than one value per channel; got input of shape {x.shape}. "
            "Use a larger batch or larger images."
        )
    mean = x.mean(axes)
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
    # Two passes, since Σx² - (Σx)² cancels where the mean is large. The variance does not change with the mean to first order:
    # Σ(x - mean) is 0. Saying so spares the gradient a pass.
    var = jnp.square(x - _over_channels(lax.stop_gradient(mean), x)).mean(axes)
    if axis_name is not None:
        var = lax.pmean(var, axis_name)
    return mean, var, count


def _over_channels(values: Float[Array, " c"], x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
    return lax.broadcast_in_dim(values, x.shape, (x.ndim - 1,))


class ConvNorm(nn.Module):
    """A size-keeping convolution followed by its norm: one of the K's of the papers' figures, as trained.

    Attributes:
        features: channels of the output.
        kernel_size: height and width of the kernel, odd.
        strides: step of the window.
        dilation: distance between the kernel's taps.
        groups: of the convolution.
        first: index of the convolution in the PyTorch `Sequential` that it mirrors; the norm has the next.
        norm: factory of the norm.
        dtype: of the computation.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    first: int = 0
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Convolve, then normalise."""
        x = Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.dilation * (self.kernel_size // 2),
            dilation=self.dilation,
            groups=self.groups,
            dtype=self.dtype,
            name=str(self.first),
        )(x)
        return self.norm(dtype=self.dtype, name=str(self.first + 1))(x, train=train)


class Dense(nn.Module):
    """Fully connected layer, `(n, c)` to `(n, features)`, initialised as `torch.nn.Linear`.

    Attributes:
        features: length of the output.
        dtype: of the computation.
    """

    features: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n c"], *, train: bool | None = None) -> Float[Array, "n d"]:
        """Multiply and add; `train` changes nothing."""
        del train
        channels = x.shape[-1]

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, minval=-(channels**-0.5), maxval=channels**-0.5)

        kernel = self.param("kernel", init, (channels, self.features), jnp.float32)
        bias = self.param("bias", init, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + jnp.broadcast_to(bias, (x.shape[0], self.features))


def check_images(images: jax.Array, smallest: int) -> None:
    """Say what is wrong with images that a network cannot take, before it shows as a map of no pixels or a wrong result.

    Raises:
        ValueError: unless `images` is float `(n, h, w, 3)` with h and w at least `smallest`.
    """
    shape = images.shape
    if len(shape) != 4 or shape[3] != 3:
        channels_first = len(shape) == 4 and shape[1] == 3
        hint = "They look like PyTorch's (n, 3, h, w): use images.transpose(0, 2, 3, 1)." if channels_first else ""
        raise ValueError(f"Expected images of shape (n, h, w, 3), channels last; got {shape}. {hint}".rstrip())
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"Expected float images, normalised as in training; got {images.dtype}. "
            "Scale to 0..1 first (images / 255), then subtract the mean and divide by the standard deviation."
        )
    if min(shape[1:3]) < smallest:
        raise ValueError(
            f"This network needs images of at least {smallest}×{smallest} px; got {shape[1]}×{shape[2]}. "
            "Below that a map is smaller than the window that pools it."
        )
