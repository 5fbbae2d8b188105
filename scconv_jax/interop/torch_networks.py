"""Residual networks in PyTorch, computed from a checkpoint's own entries; `verify` compares with them.

Nothing here uses our modules or our renaming of keys. Each key convention has its own table of keys; strides, groups and kinds of
blocks follow from keys and shapes. PyTorch is imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Tensor = Any  # torch.Tensor
Pair = tuple[str, str]  # keys of a convolution and its norm


class KeyTable(NamedTuple):
    """Keys of a residual network's modules in one convention."""

    block: str  # `{}` are the stage, from 1, and the block, from `first`
    first: int  # number of a stage's first block
    stem: Pair
    deep_stem: tuple[Pair, Pair, Pair]
    plain: tuple[Pair, Pair, Pair]  # convolutions of a plain block; the last is also that of a self-calibrated block
    a: tuple[Pair, Pair]  # self-calibrated block: 1×1 and K1 of the branch without calibration
    b: Pair  # 1×1 of the calibrated branch
    k: tuple[Pair, Pair, Pair]  # K2, K3 and K4
    shortcut: Pair
    pooled_shortcut: Pair
    head: str


def conv_bn(*names: str) -> Any:
    """Return pytorchcv's pairs with these names."""
    return tuple((f"{name}.conv", f"{name}.bn") for name in names)


_OURS = KeyTable(
    block="layer{}.{}",
    first=0,
    stem=("conv1", "bn1"),
    deep_stem=(("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")),
    plain=(("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    a=(("conv1_a", "bn1_a"), ("k1.0", "k1.1")),
    b=("conv1_b", "bn1_b"),
    k=(("scconv.k2.1", "scconv.k2.2"), ("scconv.k3.0", "scconv.k3.1"), ("scconv.k4.0", "scconv.k4.1")),
    shortcut=("downsample.0", "downsample.1"),
    pooled_shortcut=("downsample.1", "downsample.2"),
    head="fc",
)
_INIT = "features.init_block."
KEY_TABLES = {
    "mmpose": _OURS._replace(a=(("conv1", "bn1"), ("k1.0", "k1.1")), b=("conv2", "bn2")),
    "pytorchcv": KeyTable(
        block="features.stage{}.unit{}",
        first=1,
        stem=conv_bn(f"{_INIT}conv")[0],
        deep_stem=conv_bn(f"{_INIT}conv1", f"{_INIT}conv2", f"{_INIT}conv3"),
        plain=conv_bn("body.conv1", "body.conv2", "body.conv3"),
        a=conv_bn("body.conv1a", "body.conv2a"),
        b=conv_bn("body.conv1b")[0],
        k=conv_bn("body.conv2b.down.conv", "body.conv2b.conv1", "body.conv2b.conv2"),
        shortcut=("identity_block.conv", "identity_block.bn"),
        pooled_shortcut=conv_bn("identity_block.conv")[0],
        head="output",
    ),
}


class TorchOperators:
    """The operators of a network. Each takes the key of its entries; `variant` is the version of ScConv."""

    def __init__(self, entries: Mapping[str, np.ndarray], variant: str, dtype: str):
        import torch

        self.torch, self.F = torch, torch.nn.functional
        self.variant = variant
        prefix = "backbone." if any(name.startswith("backbone.") for name in entries) else ""
        self.entries = {
            name.removeprefix(prefix): torch.from_numpy(np.asarray(value).astype(dtype))
            for name, value in entries.items()
            if name.startswith(prefix) and not name.endswith("num_batches_tracked")
        }

    def has(self, name: str) -> bool:
        """Return whether there is a convolution or norm with this key."""
        return f"{name}.weight" in self.entries

    def conv_norm(self, pair: Pair, x: Tensor, *, at: str = "", stride: int = 1, dilation: int = 1) -> Tensor:
        """Apply a convolution, or the operator in its place, and its norm."""
        y = self.operator(at + pair[0], x, stride, dilation)
        mean, var, weight, bias = (
            self.entries[f"{at}{pair[1]}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return self.F.batch_norm(y, mean, var, weight, bias, eps=1e-5)

    def operator(self, name: str, x: Tensor, stride: int, dilation: int) -> Tensor:
        """Apply a convolution, a ghost convolution or an ScConv, whichever has entries."""
        if self.has(name):
            return self.conv(name, x, stride, dilation)
        if self.has(f"{name}.primary_conv.0"):
            y = self.conv(f"{name}.primary_conv.0", x, stride, dilation)
            return self.torch.cat([y, self.conv(f"{name}.cheap_operation.0", y)], dim=1)
        x = self.F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        y = self.channel_reconstruction(f"{name}.CRU.", self.spatial_reconstruction(f"{name}.SRU.gn.", x))
        return self.conv(f"{name}.projection", y) if self.has(f"{name}.projection") else y

    def conv(self, name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        """Apply a convolution that keeps the size at stride 1. The kernel's shape gives the groups."""
        weight = self.entries[f"{name}.weight"]
        size = weight.shape[-1]
        dilation = dilation if size > 1 else 1
        groups = x.shape[1] // weight.shape[1]
        return self.F.conv2d(x, weight, self.entries.get(f"{name}.bias"), stride, dilation * (size // 2), dilation, groups)

    def spatial_reconstruction(self, at: str, x: Tensor) -> Tensor:
        """Apply the SRU of the network's version; `at` is the prefix of its γ and β."""
        old = self.variant in ("2023-07", "2023-09")
        names = ("gamma", "beta") if self.variant == "2023-07" else ("weight", "bias")
        gamma, beta = (self.entries[at + name].reshape(1, -1, 1, 1) for name in names)
        groups = x.reshape(len(x), 16 if self.variant == "2023-07" else 4, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        deviation = groups.std(-1, keepdim=True) + 1e-10 if old else (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        normal = gamma * (centred / deviation).view_as(x) + beta
        weights = (gamma / gamma.sum() * normal).sigmoid()
        if old:
            first, second = (weights >= 0.5).to(x.dtype), (weights < 0.5).to(x.dtype)
        else:
            first, second = self.torch.where(weights > 0.5, 1.0, weights), self.torch.where(weights > 0.5, 0.0, weights)
        gated = normal if self.variant == "2023-09" else x
        (a1, a2), (b1, b2) = (self.torch.chunk(part * gated, 2, dim=1) for part in (first, second))
        return self.torch.cat([a1 + b2, a2 + b1], dim=1)

    def channel_reconstruction(self, at: str, x: Tensor) -> Tensor:
        """Apply the CRU of the network's version; `at` is the prefix of its entries."""
        upper, lower = x.split([self.entries[f"{at}squeeze{i}.weight"].shape[1] for i in (1, 2)], dim=1)
        upper, lower = self.conv(f"{at}squeeze1", upper), self.conv(f"{at}squeeze2", lower)
        first = self.conv(f"{at}GWC", upper) + self.conv(f"{at}PWC1", upper)
        second = self.torch.cat([self.conv(f"{at}PWC2", lower), lower], dim=1) if self.has(f"{at}PWC2") else lower
        both = self.torch.cat([first, second], dim=1)
        means = both.mean(dim=(2, 3), keepdim=True)
        if self.variant == "paper":  # a softmax over the two parts, for each channel
            shares = means.reshape(len(x), 2, -1).softmax(dim=1).reshape(means.shape)
        else:
            shares = means.softmax(dim=1)
        first, second = self.torch.chunk(shares * both, 2, dim=1)
        return first + second


class TorchResNet(TorchOperators):
    """A residual network: images `(n, 3, h, w)` to its maps. A `convention` without a table in `KEY_TABLES` means our keys."""

    def __init__(self, entries: Mapping[str, np.ndarray], convention: str, output_stride: int, variant: str, dtype: str):
        super().__init__(entries, variant, dtype)
        self.keys = KEY_TABLES.get(convention, _OURS)
        if convention == "mmpose":  # conv1.conv is conv1; norm1 and conv1.bn are bn1
            entries = {re.sub(r"\bconv(\d)\.conv\.", r"conv\1.", key): value for key, value in self.entries.items()}
            norm = re.compile(r"\b(?:conv(\d)\.(?:bn|norm)|norm(\d))\.")
            self.entries = {norm.sub(r"bn\1\2.", key): value for key, value in entries.items()}
        if self.has(f"{self.block_key(1, 0)}.identity_conv.conv"):  # pytorchcv's ResNets
            self.keys = self.keys._replace(shortcut=("identity_conv.conv", "identity_conv.bn"))
        self.output_stride = output_stride
        # The shortcuts show a v1d network, whose blocks pool as well.
        pooled = self.entries.get(f"{self.block_key(2, 0)}.{self.keys.pooled_shortcut[0]}.weight")
        self.v1d = pooled is not None and pooled.ndim == 4

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the stem's map before its ReLU, each stage's map and, if there is a head, the logits."""
        deep = self.has(self.keys.deep_stem[0][0])
        pairs = self.keys.deep_stem if deep else (self.keys.stem,)
        # Networks for small images have a 3×3 stem without stride or pooling.
        small = not deep and self.entries[f"{pairs[0][0]}.weight"].shape[-1] == 3
        x = images
        for i, pair in enumerate(pairs):
            x = self.conv_norm(pair, x if i == 0 else x.relu(), stride=2 if i == 0 and not small else 1)
        maps = {"stem": x}
        x = x.relu() if small else self.F.max_pool2d(x.relu(), 3, 2, padding=1)
        stride, dilation, stage = (1 if small else 4), 1, 1
        while self._blocks(stage):
            first, strides = dilation, 1
            if stage > 1 and stride < self.output_stride:
                strides, stride = 2, stride * 2
            elif stage > 1:
                dilation *= 2
            x = self.block(self.block_key(stage, 0), x, strides, first, begins=stage > 1)
            for block in range(1, self._blocks(stage)):
                x = self.block(self.block_key(stage, block), x, 1, dilation, begins=False)
            maps[f"layer{stage}"] = x
            stage += 1
        if self.has(self.keys.head):
            head = [self.entries[f"{self.keys.head}.{kind}"] for kind in ("weight", "bias")]
            maps["logits"] = self.F.linear(x.mean(dim=(2, 3)), *head)
        return maps

    def block_key(self, stage: int, block: int) -> str:
        """Return the key of a block, counted from 0, of a stage, counted from 1."""
        return self.keys.block.format(stage, block + self.keys.first)

    def block(self, name: str, x: Tensor, stride: int, dilation: int, *, begins: bool) -> Tensor:
        """Apply a block of either kind; `begins` means the first of a stage that halves the map or dilates instead."""
        at = name + "."
        if self.has(f"{at}{self.keys.k[0][0]}"):
            pools = self.v1d and begins
            inner = {"stride": 1 if pools else stride, "dilation": dilation}
            a, b = (self.conv_norm(pair, x, at=at).relu() for pair in (self.keys.a[0], self.keys.b))
            a = self.conv_norm(self.keys.a[1], a, at=at, **inner).relu()
            k2, k3, k4 = self.keys.k
            context = self.conv_norm(k2, self.F.avg_pool2d(b, 4), at=at, dilation=dilation)
            gate = self.torch.sigmoid(b + self.F.interpolate(context, size=b.shape[2:], mode="nearest"))
            b = self.conv_norm(k4, self.conv_norm(k3, b, at=at, dilation=dilation) * gate, at=at, **inner).relu()
            if pools:
                a, b = (self.F.avg_pool2d(y, 3, stride, padding=1) for y in (a, b))
            y = self.conv_norm(self.keys.plain[2], self.torch.cat([a, b], dim=1), at=at)
        else:
            pairs = [pair for pair in self.keys.plain if any(key.startswith(f"{at}{pair[0]}.") for key in self.entries)]
            strided = len(pairs) - 2  # the 3×3 of three convolutions, the first of two
            y = x
            for i, pair in enumerate(pairs):
                spatial = len(pairs) == 2 or i == 1
                y = self.conv_norm(pair, y, at=at, stride=stride if i == strided else 1, dilation=dilation if spatial else 1)
                y = y.relu() if i < len(pairs) - 1 else y
        if self.has(f"{at}se.fc1"):
            squeezed = self.conv(f"{at}se.fc1", y.mean(dim=(2, 3), keepdim=True)).relu()
            y = y * self.conv(f"{at}se.fc2", squeezed).sigmoid()
        return (y + self.shortcut(at, x, stride)).relu()

    def shortcut(self, at: str, x: Tensor, stride: int) -> Tensor:
        """Return the block's input in the shape of its output."""
        if self.v1d and self.has(f"{at}{self.keys.pooled_shortcut[0]}"):
            pooled = self.F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            return self.conv_norm(self.keys.pooled_shortcut, pooled, at=at)
        if self.has(f"{at}{self.keys.shortcut[0]}"):
            return self.conv_norm(self.keys.shortcut, x, at=at, stride=stride)
        return x

    def _blocks(self, stage: int) -> int:
        pattern = re.escape(self.keys.block.format(stage, "N")).replace("N", r"(\d+)\.")
        return len({found[1] for name in self.entries if (found := re.match(pattern, name))})
