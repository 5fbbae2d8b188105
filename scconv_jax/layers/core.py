"""The basic layers of all networks, with PyTorch's rules and initial values: `Conv`, `BatchNorm`, `ConvNorm`, `Dense`.

Every layer is called as `layer(x, train=train)`, so that networks can exchange one for another. `Conv` and `Dense` ignore
`train`, which is optional there. Parameters are float32, or `param_dtype`; `dtype` is the computation dtype.

Differences from Flax's layers of the same names: padding is a number, not "SAME"; `BatchNorm` stores the unbiased running
variance, as PyTorch does; `functional.conv` chooses the form of each convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from scconv_jax import functional as F
from scconv_jax.functional.batch_norm import normalize, normalize_by_batch
from scconv_jax.functional.checks import check_divides
from scconv_jax.functional.symbolic import check_multiple, is_below
from scconv_jax.layers.base import Dtype, Layer, inherited, one_number, parameter
from scconv_jax.shapes import Array, Float

Factory = Callable[..., nn.Module]
"""A module class, or a `functools.partial` of one."""

# `torch.nn.init.kaiming_normal_(mode="fan_out")`: He et al., ICCV 2015, with ReLU gain, not truncated.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(Layer):
    """Convolution with the rules of `torch.nn.Conv2d`: `(n, h, w, c)` to `(n, p, q, features)` (see `functional.conv`).

    Attributes:
        features: Channels of the output.
        kernel_size: Height and width of the kernel.
        strides: Step of the window.
        padding: Zeros added on each side. With an odd kernel, `dilation * (kernel_size // 2)` keeps the size.
        dilation: Distance between two taps of the kernel.
        groups: Number of groups of channels; each group is convolved separately.
        use_bias: Whether to add a bias, `(features,)`.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.

    Raises:
        ValueError: If `groups` does not divide the channels of input and output, or a value is out of range.
    """

    features: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        self.padding = one_number("padding", self.padding)
        if isinstance(self.padding, bool) or not isinstance(self.padding, Integral) or self.padding < 0:
            size = one_number("kernel_size", self.kernel_size)
            same = self.dilation * (size // 2) if isinstance(size, int) and isinstance(self.dilation, int) else 1
            raise ValueError(
                f"padding={self.padding!r} must be one number, the zeros on each side, as in PyTorch: padding={same} keeps the "
                'size at stride 1, padding=0 is "VALID".'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None = None) -> Float[Array, "n p q d"]:
        """Convolve. `train` is ignored."""
        del train
        channels = x.shape[-1]
        check_divides("groups", self.groups, "the channels of input and output", channels, self.features)
        shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.features)
        dtype = inherited(self, "param_dtype", jnp.float32)
        kernel = parameter(self, "kernel", inherited(self, "kernel_init", kaiming_normal), shape, dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), dtype) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = F.conv(x, kernel, strides=self.strides, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return x if bias is None else x + jnp.broadcast_to(bias, x.shape)


def conv1x1(features: int, **options: Any) -> Conv:
    """Return a 1×1 convolution; `options` are attributes of `Conv`."""
    return Conv(features, 1, **options)


def conv3x3(features: int, *, strides: int = 1, dilation: int = 1, groups: int = 1, **options: Any) -> Conv:
    """Return a 3×3 convolution that keeps the size at stride 1; the operators here replace it."""
    return Conv(features, 3, strides=strides, padding=dilation, dilation=dilation, groups=groups, **options)


class BatchNorm(Layer, kw_only=True):
    """Batch normalisation of `(..., c)` over all axes but the last, with the shape and the results of `torch.nn.BatchNorm2d`.

    Statistics are computed in float32 (float64 for float64 input). As in PyTorch, training normalises by the biased variance and
    stores the unbiased one.

    Attributes:
        momentum: Fraction of the running statistics that each step keeps; PyTorch's `momentum` is one minus this.
        epsilon: Added to the variance.
        dtype: Dtype of the result. If None, the dtype of `x`.
        axis_name: Mapped axis or axes to compute the statistics over, as PyTorch's `SyncBatchNorm` does. If None, each device
            computes its own.
        param_dtype: See `Layer`.

    Raises:
        ValueError: In training, if a channel has only one value.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    axis_name: str | tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], *, train: bool) -> Float[Array, "*batch c"]:
        """Normalise by the running statistics; if `train`, by the batch's statistics, which then update the running ones."""
        shape = (x.shape[-1],)
        param_dtype = inherited(self, "param_dtype", jnp.float32)
        scale = parameter(self, "scale", nn.initializers.ones, shape, param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, param_dtype)
        stats_dtype = jnp.promote_types(param_dtype, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        dtype = self.dtype or x.dtype
        if not train:
            return normalize(x, scale, bias, running_mean.value, running_var.value, self.epsilon, dtype)

        axis_name = None if self.is_initializing() else self.axis_name
        count = x.size // x.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
        if is_below(count, 2):
            raise ValueError(
                f"BatchNorm in training needs more than one value per channel; got input of shape {x.shape}. "
                "Use a larger batch or larger images."
            )
        running = (running_mean.value, running_var.value)
        options: dict[str, Any] = {"momentum": self.momentum, "epsilon": self.epsilon, "axis_name": axis_name, "dtype": dtype}
        y, following = normalize_by_batch(x, scale, bias, running, **options)
        if not self.is_initializing():
            running_mean.value, running_var.value = following
        return y


class ConvNorm(Layer):
    """Same-size convolution followed by a norm (K1–K4 in the 2020 paper): `(n, h, w, c)` to `(n, h / s, w / s, features)`.

    Attributes:
        features: Channels of the output.
        kernel_size: Height and width of the kernel, odd.
        strides: s, step of the window.
        dilation: Distance between two taps of the kernel.
        groups: Groups of the convolution.
        names: Names of the convolution and the norm. The default is their index in a PyTorch `Sequential`.
        norm: Factory of the norm. If None, there is no norm.
        relu: Whether a ReLU follows.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    names: tuple[str, str] = ("0", "1")
    norm: Factory | None = BatchNorm
    relu: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool | None) -> Float[Array, "n p q d"]:
        """Apply convolution, norm and ReLU. `train` is passed to the norm."""
        conv_name, norm_name = self.names
        x = Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.dilation * (self.kernel_size // 2),
            dilation=self.dilation,
            groups=self.groups,
            dtype=self.dtype,
            name=conv_name,
        )(x)
        if self.norm is not None:
            x = self.norm(dtype=self.dtype, name=norm_name)(x, train=train)
        return nn.relu(x) if self.relu else x


class Dense(Layer):
    """Linear layer with bias, initialised as `torch.nn.Linear`: `(n, c)` to `(n, features)`.

    Attributes:
        features: Length of the output.
        dtype: Computation dtype. If None, the promoted dtype of `x` and the parameters.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.
    """

    features: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n c"], *, train: bool | None = None) -> Float[Array, "n d"]:
        """Return `x @ kernel + bias`. `train` is ignored."""
        del train
        channels = x.shape[-1]

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, minval=-(channels**-0.5), maxval=channels**-0.5)

        param_dtype = inherited(self, "param_dtype", jnp.float32)
        kernel = parameter(self, "kernel", inherited(self, "kernel_init", init), (channels, self.features), param_dtype)
        bias = parameter(self, "bias", init, (self.features,), param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + jnp.broadcast_to(bias, (x.shape[0], self.features))


def check_images(images: jax.Array, channels: int = 3, *, smallest: int, stride: int = 1) -> None:
    """Raise a ValueError unless `images` is a float array `(n, h, w, channels)` with h and w at least `smallest`.

    Symbolic h and w must be multiples of `stride`, the image size divided by the size of the network's last map.
    """
    shape = images.shape
    if len(shape) != 4 or shape[3] != channels:
        hint = ""
        if len(shape) == 4 and shape[1] == channels:
            hint = f" They look like PyTorch's (n, {channels}, h, w): use images.transpose(0, 2, 3, 1)."
        elif len(shape) == 4 and shape[3] in (1, 2, 3, 4):
            hint = f" For images of {shape[3]} channels, create the network with in_channels={shape[3]}."
        raise ValueError(f"Expected images of shape (n, h, w, {channels}), channels last; got {shape}.{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"Expected float images, normalised as in training; got {images.dtype}. "
            "Scale to 0..1 first (images / 255), then subtract the mean and divide by the standard deviation."
        )
    for size in shape[1:3]:
        check_multiple(size, stride)
    if is_below(shape[1], smallest) or is_below(shape[2], smallest):
        raise ValueError(
            f"This network needs images of at least {smallest}×{smallest} px; got {shape[1]}×{shape[2]}. "
            "For smaller images, a map is smaller than the window that pools it."
        )
