"""The networks on which the papers compare their operators, in PyTorch; `build(name)` makes any of them.

Each takes its convolutions from a factory `conv(n_in, n_out, kernel_size, stride=..., dilation=...)`, so that a twin with
another operator is the same class handed another factory.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as T

from tests.reference import resnet, scnet
from tests.reference.resnet import ResNet
from tests.reference.scconv import ScConv

conv = resnet.plain_conv


def scconv(n_in: int, n_out: int, kernel_size: int = 3, *, stride: int = 1, dilation: int = 1, widen: bool = False) -> nn.Module:
    """ScConv in place of a 3×3; `widen` makes its own last convolutions change the number of channels."""
    assert (kernel_size, dilation) == (3, 1)
    return ScConv(n_in, features=n_out, stride=stride, projects=not widen)


class GhostConv(nn.Module):
    """Half of the channels by an ordinary convolution, the others from those by a depthwise 3×3 (Han et al., CVPR 2020).

    With `norm`, a BatchNorm follows each of the two, as in GhostNet, and a ReLU where `relu`.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm: bool = False,
        relu: bool = False,
    ):
        super().__init__()
        assert dilation == 1
        half = n_out // 2

        def sequence(convolution: nn.Module) -> nn.Sequential:
            return nn.Sequential(convolution, *[nn.BatchNorm2d(half)] * norm, *[nn.ReLU()] * relu)

        self.primary_conv = sequence(conv(n_in, half, kernel_size, stride=stride))
        self.cheap_operation = sequence(nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat([y, self.cheap_operation(y)], dim=1)


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each convolution; the shortcut's 1×1 takes what the first pair gives (wide networks)."""

    def __init__(self, n_in: int, n_out: int, stride: int, conv2, strided: str):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = conv(n_in, n_out, 3, stride=stride if strided == "conv1" else 1)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = conv2(n_out, n_out, 3, stride=stride if strided == "conv2" else 1)
        self.convShortcut = conv(n_in, n_out, 1, stride=stride) if n_in != n_out else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(activated)).relu())
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(nn.Module):
    """WRN-28-10 (Zagoruyko, Komodakis, BMVC 2016): three groups of four blocks."""

    def __init__(self, num_classes: int = 10, conv2=conv, strided: str = "conv2"):
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        channels = 16
        for i, width in enumerate((160, 320, 640)):
            blocks = []
            for j in range(4):
                blocks.append(PreActivationBlock(channels, width, 2 if i > 0 and j == 0 else 1, conv2, strided))
                channels = width
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean(dim=(2, 3)))


class DenseLayer(nn.Module):
    """1×1 to 128 channels, 3×3 to 32 new ones, which go before the old."""

    def __init__(self, channels: int, conv2):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv(channels, 128, 1)
        self.bn2 = nn.BatchNorm2d(128)
        self.conv2 = conv2(128, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        return torch.cat([y, x], dim=1)


class Transition(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(n_in)
        self.conv = conv(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return T.avg_pool2d(self.conv(self.bn(x).relu()), 2)


class DenseNet(nn.Module):
    """DenseNet-121 (Huang et al., CVPR 2017) for small images: growth 32, transitions halve channels and size."""

    def __init__(self, num_classes: int = 10, conv2=conv):
        super().__init__()
        channels = 64
        self.conv1 = conv(3, channels, 3)
        for i, depth in enumerate((6, 12, 24, 16), 1):
            layers = [DenseLayer(channels + 32 * j, conv2) for j in range(depth)]
            setattr(self, f"dense{i}", nn.Sequential(*layers))
            channels += 32 * depth
            if i < 4:
                setattr(self, f"trans{i}", Transition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense4(self.trans3(self.dense3(self.trans2(self.dense2(x)))))
        return self.linear(self.bn(x).relu().mean(dim=(2, 3)))


class GhostExcite(nn.Module):
    """Squeeze and excitation with a piecewise linear gate: relu6(x + 3) / 6, in pytorchcv x between 0 and 1."""

    def __init__(self, channels: int, pytorchcv: bool):
        super().__init__()
        self.pytorchcv = pytorchcv
        quarter = max(4, (channels // 4 + 2) // 4 * 4)  # to the nearest multiple of 4 ...
        if quarter < 0.9 * channels / 4:  # ... that is not more than a tenth below
            quarter += 4
        if pytorchcv:
            quarter = channels // 4
        self.conv_reduce = nn.Conv2d(channels, quarter, 1)
        self.conv_expand = nn.Conv2d(quarter, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(self.conv_reduce(x.mean(dim=(2, 3), keepdim=True)).relu())
        return x * (gate.clamp(0, 1) if self.pytorchcv else T.relu6(gate + 3) / 6)


class GhostBottleneck(nn.Module):
    """A ghost module up, a depthwise convolution where there is a stride, perhaps excitation, a ghost module down."""

    def __init__(self, kernel_size: int, n_in: int, middle: int, n_out: int, *, excite: bool, stride: int, pytorchcv: bool):
        super().__init__()

        def depthwise(channels: int, size: int = kernel_size) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, size, stride, padding=size // 2, groups=channels, bias=False)

        self.ghost1 = GhostConv(n_in, middle, norm=True, relu=True)
        self.conv_dw = depthwise(middle) if stride > 1 else None
        self.bn_dw = nn.BatchNorm2d(middle) if stride > 1 else None
        self.se = GhostExcite(middle, pytorchcv) if excite else None
        self.ghost2 = GhostConv(middle, n_out, norm=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                depthwise(n_in, 3 if pytorchcv else kernel_size),
                nn.BatchNorm2d(n_in),
                conv(n_in, n_out, 1),
                nn.BatchNorm2d(n_out),
            )
            if pytorchcv:
                self.shortcut[1].register_forward_hook(lambda _module, _inputs, y: y.relu())

    def forward(self, x: Tensor) -> Tensor:
        y = self.ghost1(x)
        if self.conv_dw is not None:
            y = self.bn_dw(self.conv_dw(y))
        if self.se is not None:
            y = self.se(y)
        return self.ghost2(y) + self.shortcut(x)


class GhostNet(nn.Module):
    """GhostNet 1.0× (Han et al., CVPR 2020, Table 7). Rows: kernel, expansion, channels, excitation, stride."""

    STAGES = (
        ((3, 16, 16, False, 1),),
        ((3, 48, 24, False, 2),),
        ((3, 72, 24, False, 1),),
        ((5, 72, 40, True, 2),),
        ((5, 120, 40, True, 1),),
        ((3, 240, 80, False, 2),),
        (
            (3, 200, 80, False, 1),
            (3, 184, 80, False, 1),
            (3, 184, 80, False, 1),
            (3, 480, 112, True, 1),
            (3, 672, 112, True, 1),
        ),
        ((5, 672, 160, True, 2),),
        ((5, 960, 160, False, 1), (5, 960, 160, True, 1)) * 2,
    )

    def __init__(self, num_classes: int = 1000, pytorchcv: bool = False):
        super().__init__()
        channels = 16
        self.conv_stem = conv(3, channels, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for rows in self.STAGES:
            blocks = []
            for kernel_size, middle, n_out, excite, stride in rows:
                options = {"excite": excite, "stride": stride, "pytorchcv": pytorchcv}
                blocks.append(GhostBottleneck(kernel_size, channels, middle, n_out, **options))
                channels = n_out
            stages.append(nn.Sequential(*blocks))
        last = nn.Sequential()
        last.add_module("conv", conv(channels, 960, 1))
        last.add_module("bn1", nn.BatchNorm2d(960))
        last.add_module("act1", nn.ReLU())
        self.blocks = nn.Sequential(*stages, nn.Sequential(last))
        self.conv_head = nn.Conv2d(960, 1280, 1, bias=not pytorchcv)
        self.bn_head = nn.BatchNorm2d(1280) if pytorchcv else nn.Identity()
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.conv_stem(x)).relu())
        x = self.bn_head(self.conv_head(x.mean(dim=(2, 3), keepdim=True))).relu()
        return self.classifier(x.flatten(1))


_SMALL = {"small": True, "num_classes": 10}
_20 = _SMALL | {"depths": (2, 2, 2), "planes": 16, "stem": (16,)}
_50 = {"depths": (3, 4, 6, 3)}
_56 = _SMALL | {"depths": (9, 9, 9), "planes": 16, "stem": (16,), "expansion": 1}
_X29 = _SMALL | {"depths": (3, 3, 3), "planes": 256, "expansion": 2}
_X29_BLOCK = partial(resnet.Bottleneck, expansion=2)
_GHOST = {"conv": GhostConv, "pointwise": partial(GhostConv, kernel_size=1)}

_RESNETS = {
    "scconv_resnet50": _50 | {"block": partial(resnet.Bottleneck, conv=scconv)},
    "scconv_resnet101": {"depths": (3, 4, 23, 3), "block": partial(resnet.Bottleneck, conv=scconv)},
    "scconv_resnet20_small": _20 | {"block": partial(resnet.Bottleneck, conv=scconv)},
    "resnet50_small": _SMALL | _50 | {"block": resnet.Bottleneck},
    "scconv_resnet50_small": _SMALL | _50 | {"block": partial(resnet.Bottleneck, conv=scconv)},
    "ghost_resnet50": _50 | {"block": partial(resnet.Bottleneck, **_GHOST)},
    "resnet56_small": _56 | {"block": resnet.BasicBlock},
    "scconv_resnet56_small": _56 | {"block": partial(resnet.BasicBlock, conv2=scconv)},
    "ghost_resnet56_small": _56 | {"block": partial(resnet.BasicBlock, conv1=GhostConv, conv2=GhostConv)},
    "resnext29_small": _X29 | {"block": partial(_X29_BLOCK, conv=partial(conv, groups=4))},
    "scconv_resnext29_small": _X29 | {"block": partial(_X29_BLOCK, conv=scconv)},
}
_OTHERS = {
    "wrn28_10_small": WideResNet,
    "scconv_wrn28_10_small": partial(WideResNet, conv2=scconv),
    "densenet121_small": DenseNet,
    "scconv_densenet121_small": partial(DenseNet, conv2=partial(scconv, widen=True)),
    "ghostnet_100": GhostNet,
    "ghostnet_100_pytorchcv": partial(GhostNet, pytorchcv=True),
}
NETWORKS = {name: partial(ResNet, **options) for name, options in (scnet.NETWORKS | _RESNETS).items()} | _OTHERS


def build(name: str, **options: object) -> nn.Module:
    """The network of that name; `options` are num_classes and, for the ImageNet ResNets, output_stride."""
    return NETWORKS[name](**options)
