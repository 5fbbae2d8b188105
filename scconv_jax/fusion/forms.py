"""The inference forms of layers. A form computes the leaves that replace a layer's parameters, and applies them.

    Folded      Conv or Dense, with the BatchNorm that follows it if there is one. With s = scale / √(var + ε):
                kernel · s,  offset = (conv's bias - mean) · s + norm's bias
    Passed      the BatchNorm of a `Folded`: returns its input
    Affine      any other BatchNorm: factor = s,  offset = bias - mean · s
    Joined      CRU: GWC and PWC1 as one dense kernel

The leaves have names that no other layer uses (`offset`, `factor`, `winograd`, `joined`), so that fused variables are never taken
for those of the original network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.fusion.winograd import winograd_conv, winograd_kernel
from scconv_jax.layers.reconstruction import CRU
from scconv_jax.layers.variants import CRUSplit

LEAVES = ("offset", "factor", "winograd", "joined")

Path = tuple[str, ...]
Leaves = dict[str, np.ndarray]


class Norm(NamedTuple):
    """A BatchNorm in inference."""

    path: Path
    epsilon: float
    dtype: str | None  # of the result

    def factor_and_offset(self, variables: Mapping[str, Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Return s and bias - mean · s in float64."""
        found = {name: np.asarray(leaf, np.float64) for part in variables.values() for name, leaf in part.items()}
        factor = found["scale"] / np.sqrt(found["var"] + self.epsilon)
        return factor, found["bias"] - found["mean"] * factor


class Folded(NamedTuple):
    """A convolution or linear layer with the norm that follows it."""

    norm: Norm | None
    winograd: bool
    leaf: str  # dtype of the leaves
    parameter: str  # dtype of the original kernel, for a layer whose dtype is None

    def leaves(self, own: Mapping[str, Any], norm: Mapping[str, Mapping[str, Any]]) -> Leaves:
        """Return the leaves, given the parameters of the layer and the variables of the norm by collection."""
        kernel = np.asarray(own["kernel"], np.float64)
        offset = np.asarray(own["bias"], np.float64) if "bias" in own else None
        if self.norm is not None:
            factor, shift = self.norm.factor_and_offset(norm)
            kernel, offset = kernel * factor, shift if offset is None else offset * factor + shift
        kernels = {"winograd": winograd_kernel(kernel)} if self.winograd else {"kernel": kernel}
        return kernels | ({} if offset is None else {"offset": offset})

    def __call__(self, layer: Any, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Apply the layer and its norm."""
        _check(layer, train)
        dtype = layer.dtype or jnp.promote_types(x.dtype, self.parameter)
        x = x.astype(dtype)
        inputs, features = x.shape[-1], layer.features
        dense = not hasattr(layer, "kernel_size")
        if dense:
            y = x @ _leaf(layer, "kernel", (inputs, features), self.leaf).astype(dtype)
        elif self.winograd:
            y = winograd_conv(x, _leaf(layer, "winograd", (6, 6, inputs, features), self.leaf).astype(dtype))
        else:
            shape = (layer.kernel_size, layer.kernel_size, inputs // layer.groups, features)
            kernel = _leaf(layer, "kernel", shape, self.leaf).astype(dtype)
            options = {name: getattr(layer, name) for name in ("strides", "padding", "dilation", "groups")}
            y = F.conv(x, kernel, **options)
        if self.norm is None and not dense and not layer.use_bias:
            return y
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        y = wide + _over(_leaf(layer, "offset", (features,), self.leaf), wide)
        return y.astype((self.norm and self.norm.dtype) or dtype)


class Passed(NamedTuple):
    """The norm of a `Folded`."""

    def __call__(self, layer: Any, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Return the input, which is already normalised."""
        _check(layer, train)
        return x


class Affine(NamedTuple):
    """A norm whose input is not the output of one convolution: one multiplication and one addition per element."""

    norm: Norm
    leaf: str

    def leaves(self, norm: Mapping[str, Mapping[str, Any]]) -> Leaves:
        """Return the leaves, given the variables of the norm by collection."""
        return dict(zip(("factor", "offset"), self.norm.factor_and_offset(norm), strict=True))

    def __call__(self, layer: Any, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Apply the norm."""
        _check(layer, train)
        dtype = self.norm.dtype or x.dtype
        x = x.astype(jnp.promote_types(jnp.promote_types(x.dtype, dtype), jnp.float32))
        factor, offset = (_leaf(layer, name, x.shape[-1:], self.leaf) for name in ("factor", "offset"))
        return (x * _over(factor, x) + _over(offset, x)).astype(dtype)


class Joined(NamedTuple):
    """A channel reconstruction unit with one kernel for GWC and PWC1."""

    winograd: bool
    leaf: str
    parameter: str
    fuse: str

    def leaves(self, own: Mapping[str, Any], conv_groups: int) -> dict[str, Any]:
        """Return the leaves of the unit, given its parameters."""
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(own))
        kernel = _dense(wide["GWC"]["kernel"], wide["PWC1"]["kernel"], conv_groups)
        name, kernel = ("winograd", winograd_kernel(kernel)) if self.winograd else ("joined", kernel)
        others = {name: wide[name] for name in ("squeeze1", "squeeze2", "PWC2") if name in wide}
        return others | {name: kernel, "offset": wide["GWC"]["bias"]}

    def __call__(self, layer: CRU, x: jax.Array, *, train: bool | None = None) -> jax.Array:
        """Apply the unit."""
        _check(layer, train)
        dtype = layer.dtype or jnp.promote_types(x.dtype, self.parameter)
        x = x.astype(dtype)
        channels, features = x.shape[-1], layer.features or x.shape[-1]
        split = CRUSplit(channels, features, layer.alpha, layer.squeeze, layer.conv_groups)
        upper, _, squeezed, low = split.widths()

        def pointwise(maps: jax.Array, name: str, outputs: int) -> jax.Array:
            kernel = _Kernel((1, 1, maps.shape[-1], outputs), self.leaf, name=name)()
            return F.conv(maps, kernel.astype(dtype))

        up = pointwise(x[..., :upper], "squeeze1", squeezed)
        down = pointwise(x[..., upper:], "squeeze2", low)
        if self.winograd:
            y1 = winograd_conv(up, _leaf(layer, "winograd", (6, 6, squeezed, features), self.leaf).astype(dtype))
        else:
            window = (layer.kernel_size, layer.kernel_size)
            kernel = _leaf(layer, "joined", (*window, squeezed, features), self.leaf).astype(dtype)
            y1 = F.conv(up, kernel, padding=layer.dilation * (layer.kernel_size // 2), dilation=layer.dilation)
        y1 = y1 + _over(_leaf(layer, "offset", (features,), self.leaf), y1)
        y2 = jnp.concatenate([pointwise(down, "PWC2", features - low), down], axis=-1) if features > low else down
        averages = jnp.stack([F.global_avg_pool(y1), F.global_avg_pool(y2)], axis=1)  # (n, 2, o)
        weights = jax.nn.softmax(averages, axis=1 if self.fuse == "pair" else (1, 2))
        beta1, beta2 = (jnp.broadcast_to(weights[:, i, None, None], y1.shape) for i in range(2))
        return beta1 * y1 + beta2 * y2


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    leaf: str

    @nn.compact
    def __call__(self) -> jax.Array:
        return _leaf(self, "kernel", self.shape, self.leaf)


Form = Folded | Passed | Affine | Joined


def _dense(gwc: np.ndarray, pwc1: np.ndarray, conv_groups: int) -> np.ndarray:
    """Return `functional.convolution.reconstruction_kernel` in NumPy's float64, whether JAX has 64 bits or not."""
    kernel = np.zeros((*gwc.shape[:2], *pwc1.shape[2:]))
    inputs, outputs = gwc.shape[2], gwc.shape[3] // conv_groups
    for i in range(conv_groups):
        columns = slice(i * outputs, (i + 1) * outputs)
        kernel[:, :, i * inputs : (i + 1) * inputs, columns] = gwc[..., columns]
    kernel[gwc.shape[0] // 2, gwc.shape[1] // 2] += pwc1[0, 0]
    return kernel


def _leaf(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(layer.param(name, nn.initializers.zeros, shape, jnp.dtype(dtype)))


def _over(per_channel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(per_channel.astype(x.dtype), x.shape)


def _check(layer: nn.Module, train: bool | None) -> None:
    if train:
        raise ValueError(
            f"{'/'.join(layer.path)}: this network is fused for inference and cannot train (train=True). Train the network that "
            "was given to scconv_jax.fuse, then fuse it again."
        )
