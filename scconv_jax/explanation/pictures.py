"""Pictures as PNG files: maps in colours, over images, in labelled rows and columns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

TILE = 104
"""Height and width of a picture's tiles, in pixels."""
GAP, LEFT, LINE = 8, 132, 16
_ANCHORS = np.array([(18, 12, 48), (82, 28, 114), (168, 44, 108), (226, 86, 68), (248, 158, 52), (252, 240, 160)])
COLOURS = np.stack([np.interp(np.linspace(0, 5, 256), np.arange(6), _ANCHORS[:, i]) for i in range(3)], -1).astype(np.uint8)
"""The colour of each of 256 values, dark to light: `(256, 3)`."""
BETAS = ((42, 111, 187), (224, 138, 30))
"""Colours of β1 and β2."""


class Row(NamedTuple):
    """One row of a sheet."""

    labels: Sequence[str]
    tiles: Sequence[np.ndarray]  # uint8 (any, any, 3)


def quantized(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return values between `low` and `high` as uint8, 0 to 255; 0 if the two are equal. What is not finite becomes 0."""
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.round(255 * np.clip(np.nan_to_num(scaled, nan=0, posinf=1, neginf=0), 0, 1)).astype(np.uint8)


def coloured(heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return a map `(h, w)` in colours, uint8 `(TILE, TILE, 3)`, interpolated between its pixels."""
    from PIL import Image

    grey = Image.fromarray(quantized(heat, low, high)).resize((TILE, TILE), Image.Resampling.BILINEAR)
    return COLOURS[np.asarray(grey)]


def tile(image: np.ndarray) -> np.ndarray:
    """Return an image, uint8 `(h, w, 1 or 3)`, as a tile. Small images show their pixels."""
    from PIL import Image

    rgb = Image.fromarray(np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image)
    small = image.shape[0] <= TILE
    return np.asarray(rgb.resize((TILE, TILE), Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR))


def overlay(image: np.ndarray, heat: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """Return a tile of an image under a map `(h, w)`, whose own largest value is the lightest."""
    mixed = (1 - strength) * tile(image) + strength * coloured(heat, 0, float(heat.max()))
    return np.round(mixed).astype(np.uint8)


def bars(betas: np.ndarray, high: float) -> np.ndarray:
    """Return a tile of β1 below β2, `(2, c)`, a column for each channel, up to `high`."""
    channels = np.arange(TILE) * betas.shape[1] // TILE
    heights = np.arange(TILE, 0, -1)[:, None] / TILE * high
    first, both = betas[0, channels], betas.sum(0)[channels]
    picture = np.full((TILE, TILE, 3), 235, np.uint8)
    picture[heights <= both] = BETAS[1]
    picture[heights <= first] = BETAS[0]
    return picture


def sheet(title: str, columns: Sequence[str], rows: Sequence[Row], caption: str) -> bytes:
    """Return a PNG file of tiles under a title, with names of rows and columns, above a caption."""
    from PIL import Image, ImageDraw, ImageFont

    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    step, top = TILE + GAP, 2 * GAP + 20 + LINE + 4
    width = LEFT + step * len(columns)
    lines = _wrapped(caption, font, width - 2 * GAP)
    picture = Image.new("RGB", (width, top + step * len(rows) + LINE * len(lines) + GAP), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), _cut(title, bold, width - 2 * GAP), "black", bold)
    for i, column in enumerate(columns):
        draw.text((LEFT + step * i, top - LINE - 4), _cut(column, font, TILE), "black", font)
    for j, row in enumerate(rows):
        for k, label in enumerate(row.labels):
            draw.text((GAP, top + step * j + 4 + LINE * k), _cut(label, font, LEFT - 2 * GAP), "black", font)
        for i, pixels in enumerate(row.tiles):
            picture.paste(Image.fromarray(pixels), (LEFT + step * i, top + step * j))
    for k, line in enumerate(lines):
        draw.text((GAP, top + step * len(rows) + LINE * k), line, (70, 70, 70), font)
    return encoded(picture, "PNG", optimize=True)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _cut(text: str, font: Any, width: float) -> str:
    """Return one line that fits into `width`."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
