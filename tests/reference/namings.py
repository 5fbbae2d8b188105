"""SCNet, ResNet and GhostNet again, in PyTorch, of modules that have other public code's names: `state_dict()` is like theirs.

    pytorchcv   https://github.com/osmr/imgclsmob, pytorch/pytorchcv/models: scnet.py, resnet.py, senet.py, resnesta.py,
                ghostnet.py, common.py
    mmpose      https://github.com/open-mmlab/mmpose, mmpose/models/backbones/scnet.py and resnet.py

Only names, order and arithmetic are theirs; each is its own implementation, which shares nothing with the other oracles.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as T


class ConvBlock(nn.Module):
    """pytorchcv's `ConvBlock`: a convolution, its norm and a ReLU."""

    def __init__(self, n_in: int, n_out: int, size: int, stride: int = 1, *, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(n_out)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x.relu() if self.relu else x


class _Down(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.pool = nn.AvgPool2d(4, 4)
        self.conv = ConvBlock(channels, channels, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class _ScConv(nn.Module):
    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.down = _Down(channels)
        self.conv1 = ConvBlock(channels, channels, 3, relu=False)
        self.conv2 = ConvBlock(channels, channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x + T.interpolate(self.down(x), size=x.shape[2:], mode="nearest"))
        return self.conv2(self.conv1(x) * gate)


class _ScBottleneck(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, average: bool):
        super().__init__()
        width = n_out // 8
        pools = average and stride > 1
        inner = 1 if pools else stride
        self.conv1a = ConvBlock(n_in, width, 1)
        self.conv2a = ConvBlock(width, width, 3, inner)
        self.conv1b = ConvBlock(n_in, width, 1)
        self.conv2b = _ScConv(width, inner)
        self.pool = nn.AvgPool2d(3, stride, padding=1) if pools else nn.Identity()
        self.conv3 = ConvBlock(2 * width, n_out, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.conv2a(self.conv1a(x)))
        z = self.pool(self.conv2b(self.conv1b(x)))
        return self.conv3(torch.cat([y, z], dim=1))


class _ResBottleneck(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.conv1 = ConvBlock(n_in, n_out // 4, 1)
        self.conv2 = ConvBlock(n_out // 4, n_out // 4, 3, stride)
        self.conv3 = ConvBlock(n_out // 4, n_out, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class _PooledShortcut(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        self.conv = ConvBlock(n_in, n_out, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class _Unit(nn.Module):
    """pytorchcv's `ScUnit` and `ResUnit`."""

    def __init__(self, kind: str, n_in: int, n_out: int, stride: int):
        super().__init__()
        average = kind == "scneta"
        self.body = _ResBottleneck(n_in, n_out, stride) if kind == "resnetb" else _ScBottleneck(n_in, n_out, stride, average)
        self.shortcut = None
        if n_in != n_out or stride != 1:
            block = _PooledShortcut(n_in, n_out, stride) if average else ConvBlock(n_in, n_out, 1, stride, relu=False)
            self.shortcut = "identity_conv" if kind == "resnetb" else "identity_block"
            setattr(self, self.shortcut, block)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + (x if self.shortcut is None else getattr(self, self.shortcut)(x))).relu()


class _ResInitBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = ConvBlock(3, channels, 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return T.max_pool2d(self.conv(x), 3, 2, padding=1)


class _SEInitBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvBlock(3, channels // 2, 3, 2)
        self.conv2 = ConvBlock(channels // 2, channels // 2, 3)
        self.conv3 = ConvBlock(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return T.max_pool2d(self.conv3(self.conv2(self.conv1(x))), 3, 2, padding=1)


class PytorchCV(nn.Module):
    """pytorchcv's `scnet50` and `scnet101` (kind "scnet"), `scneta50` and `scneta101` ("scneta"), `resnet50b` ("resnetb")."""

    def __init__(self, kind: str, depths: tuple[int, ...] = (3, 4, 6, 3), num_classes: int = 1000):
        super().__init__()
        channels = 128 if kind == "scneta" and depths[2] == 23 else 64
        self.features = nn.Sequential()
        self.features.add_module("init_block", _SEInitBlock(channels) if kind == "scneta" else _ResInitBlock(channels))
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            for j in range(depth):
                stage.add_module(f"unit{j + 1}", _Unit(kind, channels, 256 * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = 256 * 2**i
            self.features.add_module(f"stage{i + 1}", stage)
        self.output = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x).mean(dim=(2, 3)))


class _MMSCConv(nn.Module):
    def __init__(self, channels: int, stride: int):
        super().__init__()

        def conv(stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, stride, 1, bias=False)

        self.k2 = nn.Sequential(nn.AvgPool2d(4, 4), conv(), nn.BatchNorm2d(channels))
        self.k3 = nn.Sequential(conv(), nn.BatchNorm2d(channels))
        self.k4 = nn.Sequential(conv(stride), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.k4(self.k3(x) * torch.sigmoid(x + T.interpolate(self.k2(x), x.shape[2:])))


class _MMBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        width = n_out // 8
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)  # the first branch's ...
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(n_in, width, 1, bias=False)  # ... and the second's, beside it, not after it
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(2 * width, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.k1 = nn.Sequential(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.scconv = _MMSCConv(width, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.k1(self.bn1(self.conv1(x)).relu())
        b = self.scconv(self.bn2(self.conv2(x)).relu())
        y = self.bn3(self.conv3(torch.cat([a, b], dim=1)))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class MMPoseBackbone(nn.Module):
    """mmpose's `SCNet`: four stages, no head."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(_MMBlock(channels, 256 * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = 256 * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = T.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class MMPose(nn.Module):
    """A pose network of mmpose: backbone, and a head of which only the entries matter here."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3)):
        super().__init__()
        self.backbone = MMPoseBackbone(depths)
        self.keypoint_head = nn.Module()
        self.keypoint_head.final_layer = nn.Conv2d(8, 17, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class MMPoseModules(MMPose):
    """The same under the names of other networks of that family: conv1.conv, and norm1 or conv1.bn."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), norm: str = "norm{}"):
        super().__init__(depths)
        self.norm = norm

    def state_dict(self, *args, **options):
        """Under those names."""

        def renamed(name: str) -> str:
            name = re.sub(r"\bconv(\d)\.", r"conv\1.conv.", name)
            return re.sub(r"\bbn(\d)\.", lambda found: self.norm.format(found[1]) + ".", name)

        return {renamed(name): value for name, value in super().state_dict(*args, **options).items()}


def _block(n_in: int, n_out: int, size: int = 1, stride: int = 1, *, depthwise: bool = False, relu: bool = True) -> nn.Module:
    """A `ConvBlock`, depthwise perhaps."""
    block = ConvBlock(n_in, n_out, size, stride, relu=relu)
    if depthwise:
        block.conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=n_out, bias=False)
    return block


class _GhostConv(nn.Module):
    def __init__(self, n_in: int, n_out: int, *, relu: bool = True):
        super().__init__()
        self.main_conv = _block(n_in, n_out // 2, relu=relu)
        self.cheap_conv = _block(n_out // 2, n_out // 2, 3, depthwise=True, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        x = self.main_conv(x)
        return torch.cat([x, self.cheap_conv(x)], dim=1)


class _GhostSE(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 4, 1)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.clamp(self.conv2(self.conv1(x.mean((2, 3), keepdim=True)).relu()), 0, 1)


class _GhostExpansion(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, size: int, factor: float, se: bool):
        super().__init__()
        middle = round(factor * n_in)
        self.exp_conv = _GhostConv(n_in, middle)
        self.dw_conv = _block(middle, middle, size, stride, depthwise=True, relu=False) if stride > 1 else nn.Identity()
        self.se = _GhostSE(middle) if se else nn.Identity()
        self.pw_conv = _GhostConv(middle, n_out, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw_conv(self.se(self.dw_conv(self.exp_conv(x))))


class _Separable(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.dw_conv = _block(n_in, n_in, 3, stride, depthwise=True)
        self.pw_conv = _block(n_in, n_out, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw_conv(self.dw_conv(x))


class _GhostUnit(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, size: int, factor: float, se: bool):
        super().__init__()
        self.body = _GhostExpansion(n_in, n_out, stride, size, factor, se)
        self.identity_conv = _Separable(n_in, n_out, stride) if n_in != n_out or stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.identity_conv(x)


class _GhostHead(nn.Module):
    def __init__(self, n_in: int, middle: int, num_classes: int):
        super().__init__()
        self.conv1 = _block(n_in, middle)
        self.conv2 = nn.Conv2d(middle, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class PytorchCVGhostNet(nn.Module):
    """pytorchcv's `ghostnet`."""

    STAGES = (  # kernel size, then a unit's channels, factor, squeeze and excitation
        (3, ((16, 1, False),)),
        (3, ((24, 3, False), (24, 3, False))),
        (5, ((40, 3, True), (40, 3, True))),
        (3, ((80, 6, False), (80, 2.5, False), (80, 2.3, False), (80, 2.3, False), (112, 6, True), (112, 6, True))),
        (5, ((160, 6, True), (160, 6, False), (160, 6, True), (160, 6, False), (160, 6, True))),
    )

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        channels = 16
        self.features = nn.Sequential()
        self.features.add_module("init_block", ConvBlock(3, channels, 3, 2))
        for i, (size, units) in enumerate(self.STAGES):
            stage = nn.Sequential()
            for j, (n_out, factor, se) in enumerate(units):
                stride = 2 if i > 0 and j == 0 else 1
                stage.add_module(f"unit{j + 1}", _GhostUnit(channels, n_out, stride, size, factor, se))
                channels = n_out
            self.features.add_module(f"stage{i + 1}", stage)
        self.features.add_module("final_block", _block(channels, 960))
        self.output = _GhostHead(960, 1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x).mean((2, 3), keepdim=True)).flatten(1)
