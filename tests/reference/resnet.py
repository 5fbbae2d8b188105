"""Residual networks of bottlenecks (He et al., CVPR 2016), stride in the 3×3, in PyTorch.

One class for every trunk here: the ImageNet one (7×7 or three 3×3 in the stem, four stages, dilated or not) and the one
for small images (3×3 stem, no pool, three stages). The block is handed in.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al., CVPR 2018): scales each channel by a gate read off all channels' means."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * self.fc2(self.fc1(mean).relu()).sigmoid()


def plain_conv(n_in: int, n_out: int, kernel_size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, at stride 1."""
    pad = dilation * (kernel_size // 2)
    return nn.Conv2d(n_in, n_out, kernel_size, stride, pad, dilation, groups, bias=False)


plain_conv1x1 = partial(plain_conv, kernel_size=1)


class BasicBlock(nn.Module):
    """Two 3×3, plus the shortcut."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        downsample: nn.Module | None,
        conv1: Callable[..., nn.Module] = plain_conv,
        conv2: Callable[..., nn.Module] = plain_conv,
    ):
        super().__init__()
        self.conv1 = conv1(in_channels, planes, 3, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv2(planes, planes, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        return (y + shortcut).relu()


class Bottleneck(nn.Module):
    """1×1 down, 3×3, 1×1 up, plus the shortcut."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        downsample: nn.Module | None,
        expansion: int = 4,
        conv: Callable[..., nn.Module] = plain_conv,
        pointwise: Callable[..., nn.Module] = plain_conv1x1,
    ):
        super().__init__()
        self.conv1 = pointwise(in_channels, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = pointwise(planes, planes * expansion)
        self.bn3 = nn.BatchNorm2d(planes * expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + shortcut).relu()


def shortcut(n_in: int, n_out: int, stride: int, *, avg_down: bool = False) -> nn.Sequential:
    """What brings a block's input to the shape of its output; `avg_down` takes the stride by an average pool."""
    if not avg_down:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))


def _imagenet_stem(widths: Sequence[int]) -> nn.Module:
    """One width: a 7×7 with stride 2. Several: a 3×3 each, the first with stride 2, norm and ReLU between."""
    if len(widths) == 1:
        return nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False)
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
        if i > 0:
            layers += [nn.BatchNorm2d(n_in), nn.ReLU()]
        layers.append(nn.Conv2d(n_in, n_out, 3, 2 if i == 0 else 1, padding=1, bias=False))
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pool, linear.

    Args:
        block: makes a block from `(in_channels, planes, *, stride, dilation, downsample)`, and `avd` where asked.
        depths: blocks in each stage.
        planes: of the first stage, doubled in each following one.
        stem: channels of the stem's convolutions; `small` makes it one 3×3 with stride 1, and no pool
            after it.
        output_stride: 32, or 16 or 8, where the last stage or two trade their stride for dilation.
        avg_down: a shortcut's stride is an average pool before its 1×1.
        avd: the first block of each stage but the first takes its stride by an average pool after its 3×3s; it has that
            pool in a dilated stage too, where there is no stride.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        planes: int = 64,
        stem: Sequence[int] = (64,),
        small: bool = False,
        output_stride: int = 32,
        avg_down: bool = False,
        avd: bool = False,
        expansion: int = 4,
    ):
        super().__init__()
        self.small = small
        self.conv1 = plain_conv(3, stem[0], 3) if small else _imagenet_stem(stem)
        self.bn1 = nn.BatchNorm2d(stem[-1])
        channels = stem[-1]
        # (stride, dilation, dilation of the first block) of each stage
        plan = {
            32: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)],
            16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 1)],
            8: [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 2)],
        }[output_stride]
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, depth in enumerate(depths):
            stride, dilation, first_dilation = plan[i]
            width = planes * 2**i
            blocks = []
            for j in range(depth):
                downsample = None
                if j == 0 and (stride > 1 or channels != width * expansion):
                    downsample = shortcut(channels, width * expansion, stride, avg_down=avg_down)
                blocks.append(
                    block(
                        channels,
                        width,
                        stride=stride if j == 0 else 1,
                        dilation=first_dilation if j == 0 else dilation,
                        downsample=downsample,
                        **({"avd": True} if avd and i > 0 and j == 0 else {}),
                    )
                )
                channels = width * expansion
            setattr(self, self.stages[i], nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        x = self.bn1(self.conv1(x)).relu()
        if not self.small:
            x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        maps = {}
        for stage in self.stages:
            x = maps[stage] = getattr(self, stage)(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)[self.stages[-1]].mean(dim=(2, 3)))
