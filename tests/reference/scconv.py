"""Spatial and channel reconstruction convolutions (Li, Wen, He, CVPR 2023) in PyTorch, in all versions in public use.

The authors released no code. `VERSIONS` tells the paper from the three states (2023-07, -09, -10) of the code that people
copy, https://github.com/cheng-haha/ScConv; entries are named as theirs, so that their checkpoints fit.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Version(NamedTuple):
    """What the versions differ in."""

    unbiased: bool  # group norm by the unbiased deviation + 1e-10, or by sqrt(biased variance + 1e-5)
    step: bool  # the gate passes 1 or 0; otherwise weights at or below the threshold stay what they are
    gates_norm: bool  # the gate multiplies GN(X), not X
    pairwise: bool  # softmax over the pair of each channel (Eq. 8), not over all 2C averages
    groups: int
    names: tuple[str, str]
    axes: int  # trailing axes of length 1 in the shape of gamma and beta


VERSIONS = {
    "paper": Version(False, False, False, True, 4, ("weight", "bias"), 0),
    "2023-07": Version(True, True, False, False, 16, ("gamma", "beta"), 2),
    "2023-09": Version(True, True, True, False, 4, ("weight", "bias"), 2),
    "2023-10": Version(False, False, False, False, 4, ("weight", "bias"), 0),
}


class GroupNorm(nn.Module):
    """Over the pixels and channels of each group; also gives each channel's share of all gammas."""

    def __init__(self, channels: int, version: Version, groups: int):
        super().__init__()
        self.version, self.groups = version, groups
        shape = (channels,) + (1,) * version.axes
        gamma, beta = version.names
        self.register_parameter(gamma, nn.Parameter(torch.ones(shape)))
        self.register_parameter(beta, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = (getattr(self, name).view(1, -1, 1, 1) for name in self.version.names)
        grouped = x.reshape(len(x), self.groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        if self.version.unbiased:
            normal = centred / (grouped.std(dim=2, keepdim=True, unbiased=True) + 1e-10)
        else:
            normal = centred / (grouped.var(dim=2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return gamma * normal.view_as(x) + beta, gamma / gamma.sum()


class SRU(nn.Module):
    """Splits the map by a gate into what is informative and what is not, and crosses the halves of the two."""

    def __init__(self, channels: int, version: Version, groups: int | None = None, threshold: float = 0.5):
        super().__init__()
        self.version, self.threshold = version, threshold
        self.gn = GroupNorm(channels, version, groups or version.groups)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """GN(X), and the gate's weights before the threshold."""
        normal, share = self.gn(x)
        return normal, (share * normal).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        normal, w = self.weights(x)
        if self.version.step:
            above = (w >= self.threshold).to(w.dtype)
            first, second = above, 1 - above
        else:
            above = w > self.threshold
            first, second = torch.where(above, 1.0, w), torch.where(above, 0.0, w)
        gated = normal if self.version.gates_norm else x
        x11, x12 = (first * gated).chunk(2, dim=1)
        x21, x22 = (second * gated).chunk(2, dim=1)
        return torch.cat([x11 + x22, x12 + x21], dim=1)


class CRU(nn.Module):
    """Splits the channels, transforms a share of alpha richly and the rest cheaply, and weighs the two results."""

    def __init__(
        self,
        channels: int,
        version: Version,
        features: int | None = None,
        alpha: float = 0.5,
        squeeze: int = 2,
        conv_groups: int = 2,
        kernel_size: int = 3,
    ):
        super().__init__()
        self.version = version
        features = features or channels
        self.up = int(alpha * channels)
        self.low = channels - self.up
        up, low = self.up // squeeze, self.low // squeeze
        self.squeeze1 = nn.Conv2d(self.up, up, 1, bias=False)
        self.squeeze2 = nn.Conv2d(self.low, low, 1, bias=False)
        self.GWC = nn.Conv2d(up, features, kernel_size, padding=kernel_size // 2, groups=conv_groups)
        self.PWC1 = nn.Conv2d(up, features, 1, bias=False)
        self.PWC2 = nn.Conv2d(low, features - low, 1, bias=False) if features > low else None

    def forward(self, x: Tensor) -> Tensor:
        up, low = x.split([self.up, self.low], dim=1)
        up, low = self.squeeze1(up), self.squeeze2(low)
        y1 = self.GWC(up) + self.PWC1(up)
        y2 = low if self.PWC2 is None else torch.cat([self.PWC2(low), low], dim=1)
        means = torch.stack([y1.mean(dim=(2, 3)), y2.mean(dim=(2, 3))], dim=1)  # (n, 2, c)
        beta = means.softmax(dim=1) if self.version.pairwise else means.flatten(1).softmax(dim=1).view_as(means)
        return beta[:, 0, :, None, None] * y1 + beta[:, 1, :, None, None] * y2


class ScConv(nn.Module):
    """SRU and CRU as arranged: S+C, C+S, S&C (added), S or C.

    The paper defines neither strides nor other channels out than in. Here a stride is an average pool before the units,
    over the pixels that there are, and a 1×1 convolution follows them where the channels change, or (`projects=False`)
    the last convolutions of the CRU have as many outputs as are wanted.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "paper",
        *,
        features: int | None = None,
        stride: int = 1,
        groups: int | None = None,
        threshold: float = 0.5,
        arrangement: str = "S+C",
        projects: bool = True,
        **cru: float,
    ):
        super().__init__()
        version = VERSIONS[variant]
        self.arrangement = arrangement
        self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        if "S" in arrangement:
            self.SRU = SRU(channels, version, groups, threshold)
        if "C" in arrangement:
            self.CRU = CRU(channels, version, None if projects else features, **cru)
        changes = projects and features not in (None, channels)
        self.projection = nn.Conv2d(channels, features, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        if self.arrangement == "S&C":
            x = self.SRU(x) + self.CRU(x)
        else:
            for unit in self.arrangement.split("+"):
                x = self.SRU(x) if unit == "S" else self.CRU(x)
        return x if self.projection is None else self.projection(x)
