"""Images as a network expects them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preparation:
    """How images become a network's input in testing: resize, crop, normalise (torchvision's evaluation transform).

    Attributes:
        size: height and width of the central crop, pixels.
        resize: length of the shorter side before the crop, pixels.
        mean: subtracted from each channel of images in 0..1.
        std: divides each channel after that.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
