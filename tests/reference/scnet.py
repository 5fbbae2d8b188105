"""Self-calibrated convolutions (Liu et al., CVPR 2020) in PyTorch.

With X = [X1, X2] split by channels: T = pool_r(X1); Y1 = K4((K3 X1) · σ(X1 + up(K2 T))); Y2 = K1 X2; Y = [Y1, Y2].
Each K is a 3×3 convolution without bias and a BatchNorm; `up` takes nearest neighbours; a stride is on K1 and K4.
Entries are named as in the published checkpoints of https://github.com/MCG-NKU/SCNet.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tests.reference.resnet import Bottleneck, SqueezeExcite


def _conv3x3(channels: int, *, stride: int = 1, dilation: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


class SelfCalibration(nn.Module):
    """The calibrated branch: K2, K3 and K4."""

    def __init__(self, channels: int, stride: int = 1, dilation: int = 1, groups: int = 1, pooling: int = 4):
        super().__init__()
        conv = partial(_conv3x3, channels, dilation=dilation, groups=groups)
        self.k2 = nn.Sequential(nn.AvgPool2d(pooling), conv(), nn.BatchNorm2d(channels))
        self.k3 = nn.Sequential(conv(), nn.BatchNorm2d(channels))
        self.k4 = nn.Sequential(conv(stride=stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        context = nn.functional.interpolate(self.k2(x), size=x.shape[2:], mode="nearest")
        return self.k4(self.k3(x) * (x + context).sigmoid())


class SelfCalibratedConv(nn.Module):
    """The whole operator of the paper, C → C: the first half calibrated, the second half through K1."""

    def __init__(self, channels: int, stride: int = 1, dilation: int = 1, groups: int = 1, pooling: int = 4):
        super().__init__()
        half = channels // 2
        conv = _conv3x3(half, stride=stride, dilation=dilation, groups=groups)
        self.k1 = nn.Sequential(conv, nn.BatchNorm2d(half))
        self.scconv = SelfCalibration(half, stride, dilation, groups, pooling)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return torch.cat([self.scconv(x1), self.k1(x2)], dim=1)


class SCBottleneck(nn.Module):
    """Two 1×1 branches, one through K1, one through the calibrated branch, joined by the last 1×1."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        downsample: nn.Module | None,
        bottleneck_width: int = 32,
        cardinality: int = 1,
        pooling: int = 4,
        avd: bool = False,
        se_reduction: int | None = None,
    ):
        super().__init__()
        width = int(planes * bottleneck_width / 64) * cardinality
        out_channels = 4 * planes
        self.avd = nn.AvgPool2d(3, stride, padding=1) if avd else None
        stride = 1 if avd else stride
        self.conv1_a = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1_a = nn.BatchNorm2d(width)
        self.k1 = nn.Sequential(_conv3x3(width, stride=stride, dilation=dilation, groups=cardinality), nn.BatchNorm2d(width))
        self.conv1_b = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1_b = nn.BatchNorm2d(width)
        self.scconv = SelfCalibration(width, stride, dilation, cardinality, pooling)
        self.conv3 = nn.Conv2d(2 * width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcite(out_channels, se_reduction) if se_reduction else None
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        a = self.k1(self.bn1_a(self.conv1_a(x)).relu()).relu()
        b = self.scconv(self.bn1_b(self.conv1_b(x)).relu()).relu()
        if self.avd is not None:
            a, b = self.avd(a), self.avd(b)
        y = self.bn3(self.conv3(torch.cat([a, b], dim=1)))
        if self.se is not None:
            y = self.se(y)
        return (y + shortcut).relu()


_50, _101 = (3, 4, 6, 3), (3, 4, 23, 3)
_SC = {"block": SCBottleneck}
_SCNEXT = _SC | {"block": partial(SCBottleneck, bottleneck_width=2, cardinality=32)}
_SE = _SC | {"block": partial(SCBottleneck, se_reduction=16)}
_V1D = _SC | {"avd": True, "avg_down": True}
_SMALL = {"depths": (2, 2, 2), "planes": 16, "stem": (16,), "small": True, "num_classes": 10}

NETWORKS = {
    "resnet50": {"block": Bottleneck, "depths": _50},
    "resnet101": {"block": Bottleneck, "depths": _101},
    "scnet50": _SC | {"depths": _50},
    "scnet101": _SC | {"depths": _101},
    "scnet50_v1d": _V1D | {"depths": _50, "stem": (32, 32, 64)},
    "scnet101_v1d": _V1D | {"depths": _101, "stem": (64, 64, 128)},
    "scnext50": _SCNEXT | {"depths": _50},
    "scnext101": _SCNEXT | {"depths": _101},
    "se_scnet50": _SE | {"depths": _50},
    "se_scnet101": _SE | {"depths": _101},
    "resnet20_small": {"block": Bottleneck} | _SMALL,
    "scnet20_small": _SC | _SMALL,
}
