"""GhostNet in PyTorch, both its authors' and pytorchcv's, computed from a checkpoint's own entries; see `torch_networks.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scconv_jax.interop.torch_networks import Pair, Tensor, TorchOperators, conv_bn


class KeyTable(NamedTuple):
    """Keys of GhostNet's modules in one convention. Keys within a block omit its prefix."""

    block: str  # regular expression for the prefix of a block, with the two numbers that order blocks
    stem: Pair
    expand: tuple[Pair, Pair]
    depthwise: Pair
    gate: tuple[str, str]
    project: tuple[Pair, Pair]
    shortcut: tuple[Pair, Pair]
    last: Pair
    head: Pair  # only pytorchcv's has a norm
    classifier: str


AUTHORS = KeyTable(
    block=r"(blocks\.(\d+)\.(\d+)\.)ghost1",
    stem=("conv_stem", "bn1"),
    expand=(("ghost1.primary_conv.0", "ghost1.primary_conv.1"), ("ghost1.cheap_operation.0", "ghost1.cheap_operation.1")),
    depthwise=("conv_dw", "bn_dw"),
    gate=("se.conv_reduce", "se.conv_expand"),
    project=(("ghost2.primary_conv.0", "ghost2.primary_conv.1"), ("ghost2.cheap_operation.0", "ghost2.cheap_operation.1")),
    shortcut=(("shortcut.0", "shortcut.1"), ("shortcut.2", "shortcut.3")),
    last=("blocks.9.0.conv", "blocks.9.0.bn1"),
    head=("conv_head", ""),
    classifier="classifier",
)
PYTORCHCV = KeyTable(
    block=r"(features\.stage(\d+)\.unit(\d+)\.)body\.exp_conv",
    stem=("features.init_block.conv", "features.init_block.bn"),
    expand=conv_bn("body.exp_conv.main_conv", "body.exp_conv.cheap_conv"),
    depthwise=("body.dw_conv.conv", "body.dw_conv.bn"),
    gate=("body.se.conv1", "body.se.conv2"),
    project=conv_bn("body.pw_conv.main_conv", "body.pw_conv.cheap_conv"),
    shortcut=conv_bn("identity_conv.dw_conv", "identity_conv.pw_conv"),
    last=("features.final_block.conv", "features.final_block.bn"),
    head=("output.conv1.conv", "output.conv1.bn"),
    classifier="output.conv2",
)


class TorchGhostNet(TorchOperators):
    """GhostNet: images `(n, 3, h, w)` to the stem before its ReLU, the last map of each size, and the logits."""

    def __init__(self, entries: Mapping[str, np.ndarray], convention: str, dtype: str):
        super().__init__(entries, "", dtype)
        self.pytorchcv = convention == "pytorchcv-ghostnet"
        self.keys = PYTORCHCV if self.pytorchcv else AUTHORS

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps and the logits."""
        x = self.conv_norm(self.keys.stem, images, stride=2)
        maps = {"stem": x}
        x = x.relu()
        found = (re.match(self.keys.block, name) for name in self.entries)
        blocks = {(int(match[2]), int(match[3])): match[1] for match in found if match}
        for _, at in sorted(blocks.items()):
            strided = self.has(at + self.keys.depthwise[0])
            if strided:
                maps[f"layer{len(maps)}"] = x
            x = self._block(at, x, stride=2 if strided else 1)
        maps[f"layer{len(maps)}"] = x = self.conv_norm(self.keys.last, x).relu()
        x = x.mean(dim=(2, 3), keepdim=True)
        x = self.conv_norm(self.keys.head, x) if self.keys.head[1] else self.conv(self.keys.head[0], x)
        weight, bias = (self.entries[f"{self.keys.classifier}.{kind}"] for kind in ("weight", "bias"))
        return {**maps, "logits": self.F.linear(x.relu().flatten(1), weight.flatten(1), bias)}

    def _block(self, at: str, x: Tensor, stride: int) -> Tensor:
        y = self._ghost(self.keys.expand, at, x, relu=True)
        if stride > 1:
            y = self.conv_norm(self.keys.depthwise, y, at=at, stride=stride)
        if self.has(at + self.keys.gate[0]):
            squeezed = self.conv(at + self.keys.gate[0], y.mean(dim=(2, 3), keepdim=True)).relu()
            gate = self.conv(at + self.keys.gate[1], squeezed)
            y = y * (gate.clamp(0, 1) if self.pytorchcv else (gate + 3).clamp(0, 6) / 6)
        y = self._ghost(self.keys.project, at, y, relu=False)
        first, second = self.keys.shortcut
        if self.has(at + first[0]):
            x = self.conv_norm(first, x, at=at, stride=stride)
            x = self.conv_norm(second, x.relu() if self.pytorchcv else x, at=at)
        return y + x

    def _ghost(self, pairs: tuple[Pair, Pair], at: str, x: Tensor, *, relu: bool) -> Tensor:
        """Compute half of the channels, then the other half from them, each with its norm."""
        first = self.conv_norm(pairs[0], x, at=at)
        first = first.relu() if relu else first
        second = self.conv_norm(pairs[1], first, at=at)
        return self.torch.cat([first, second.relu() if relu else second], dim=1)
