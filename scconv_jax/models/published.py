"""The sizes that the two papers print for their networks, each with the margin within which ours agrees, and why.

SC-Conv: Liu et al., CVPR 2020, and the README of https://github.com/MCG-NKU/SCNet. ScConv: Li et al., CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_ROUNDED = "printed with one decimal"
_ALIKE = "the same count"
_OWN = "the paper's figure is above its own Eq. 11"
_UNNAMED = "groups and width not given; 4×64d is nearest"


class Row(NamedTuple):
    """One network of a paper's table."""

    paper: int  # year
    label: str  # as the paper calls it
    model: str
    parameters: float  # millions
    multiply_adds: float  # billions
    margins: tuple[float, float]  # percent, of parameters and of multiply-adds
    reason: str
    options: Mapping[str, Any] = {}
    size: int = 224  # pixels


ROWS = (
    Row(2020, "ResNet-50", "resnet50", 25.6, 4.1, (0.5, 2.0), _ROUNDED),
    Row(2020, "ResNet-101", "resnet101", 44.5, 7.8, (0.5, 2.0), _ROUNDED),
    Row(2020, "SCNet-50", "scnet50", 25.6, 4.0, (0.5, 2.0), _ROUNDED),
    Row(2020, "SCNet-101", "scnet101", 44.6, 7.2, (0.5, 2.0), _ROUNDED),
    Row(2020, "SCNet-50 v1d", "scnet50_v1d", 25.6, 4.7, (0.5, 2.0), _ROUNDED),
    Row(2020, "SCNeXt-50", "scnext50", 25.0, 4.3, (0.5, 2.0), _ROUNDED),
    Row(2020, "SCNeXt-101", "scnext101", 44.2, 8.0, (0.5, 2.0), _ROUNDED),
    Row(2020, "SE-SCNet-50", "se_scnet50", 28.1, 4.0, (0.5, 2.0), _ROUNDED),
    Row(2020, "SE-SCNet-101", "se_scnet101", 49.3, 7.2, (0.5, 2.0), _ROUNDED),
    Row(2023, "ResNet-50", "resnet50", 25.56, 4.09, (0.5, 0.5), _ALIKE),
    Row(2023, "ResNet-50, α = 1/2", "scconv_resnet50", 16.78, 2.70, (2.0, 3.0), _OWN),
    Row(2023, "ResNet-50, α = 3/4", "scconv_resnet50", 17.69, 2.87, (2.0, 4.0), _OWN, {"alpha": 0.75}),
    Row(2023, "ResNet-101", "resnet101", 44.55, 7.83, (0.5, 0.5), _ALIKE),
    Row(2023, "ResNet-101, α = 1/2", "scconv_resnet101", 28.00, 4.90, (2.0, 3.0), _OWN),
    Row(2023, "ResNet-56", "resnet56_small", 0.86, 0.12684, (0.5, 0.5), _ALIKE, {}, 32),
    Row(2023, "ResNet-56, ScConv", "scconv_resnet56_small", 0.52, 0.07955, (2.0, 5.0), _OWN, {}, 32),
    Row(2023, "ResNet-50", "resnet50_small", 23.52, 1.30, (0.5, 0.5), _ALIKE, {}, 32),
    Row(2023, "ResNet-50, ScConv", "scconv_resnet50_small", 14.69, 0.831, (2.0, 2.0), _OWN, {}, 32),
    Row(2023, "ResNeXt-29", "resnext29_small", 28.27, 4.55, (4.5, 7.5), _UNNAMED, {}, 32),
    Row(2023, "ResNeXt-29, ScConv", "scconv_resnext29_small", 22.31, 3.57, (14.0, 12.0), _UNNAMED, {}, 32),
    Row(2023, "WRN-28-10", "wrn28_10_small", 36.55, 5.96, (0.5, 0.5), _ALIKE, {"num_classes": 100}, 32),
    Row(2023, "WRN-28-10, ScConv", "scconv_wrn28_10_small", 21.12, 3.75, (0.5, 2.0), _OWN, {"num_classes": 100}, 32),
    Row(2023, "DenseNet-121", "densenet121_small", 7.05, 0.898, (0.5, 1.0), _ALIKE, {"num_classes": 100}, 32),
    Row(2023, "DenseNet-121, ScConv", "scconv_densenet121_small", 5.45, 0.594, (1.0, 1.0), _ALIKE, {"num_classes": 100}, 32),
)
