"""One self-contained HTML page in which view, layer, class and strength of the overlay can be switched.

All data stand in the page: images as data addresses, maps as bytes in base64. Names of files and classes reach the page as JSON
and are shown as text only.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from scconv_jax.explanation.explained import Explained, extent
from scconv_jax.explanation.pictures import COLOURS, encoded, quantized
from scconv_jax.messages import printable, shortened

CHANNELS = 8
"""Channels of each gate and map in the page, beside their mean: those that vary most between pixels."""

RANKS = ("most probable class", "second class", "third class")

VIEWS = (
    {
        "id": "cams",
        "label": "Grad-CAM",
        "option": "Class",
        "about": "Where the network sees the class: the layer's map, weighted by the derivative of the class's logit. Each map "
        "has its own scale.",
    },
    {
        "id": "gates",
        "label": "Calibration gate",
        "option": "Channel",
        "about": "The gate σ(X1 + X1') of a self-calibrated convolution, which multiplies X1 ∗ K3: near 1 the value passes, near "
        "0 it does not.",
    },
    {
        "id": "informative",
        "label": "SRU: informative",
        "option": "Channel",
        "about": "W1 · X, the part of the map that the SRU holds to be informative.",
    },
    {
        "id": "redundant",
        "label": "SRU: redundant",
        "option": "Channel",
        "about": "W2 · X, the part of the map that the SRU holds to be redundant. Mind the scale: its values are smaller.",
    },
)


def page(files: Sequence[str], networks: Sequence[Explained], *, title: str, summary: str) -> str:
    """Return the page as HTML.

    Args:
        files: Name of each image.
        networks: One network, or two to be compared on the same images. The first gives the classes of Grad-CAM.
        title: Title of the page.
        summary: A sentence under the title.
    """
    data = {
        "title": title,
        "summary": summary,
        "files": [plain(file) for file in files],
        "colours": _base64(COLOURS),
        "views": VIEWS,
        "networks": [_network(network) for network in networks],
    }
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    template = resources.files("scconv_jax.explanation").joinpath("page.html").read_text("utf-8")
    start, middle, end = (part for piece in template.split("{title}") for part in piece.split("{data}"))
    return start + html.escape(title) + middle + text + end


def label(path: str) -> str:
    """Return "layer1, block 0" for the path of an operator in the variables, and other paths as they are."""
    parts = [part for part in path.split("/") if part not in ("scconv", "SRU", "CRU", "conv2")]
    return f"{parts[0]}, block {parts[1]}" if len(parts) == 2 and parts[1].isdecimal() else path


def plain(name: str) -> str:
    """Return a name for a page or picture: one line, no sign that turns the direction of what follows, not very long."""
    return shortened(printable(name))


def class_texts(network: Explained, option: int) -> list[str]:
    """Return "class NAME (12.3 %)" of each image, for one of the classes that were explained."""
    names = network.trained.readable_names
    return [
        f"class {plain(names[row[option]])} ({100 * share[row[option]]:.1f} %)"
        for row, share in zip(network.classes, network.probabilities, strict=True)
    ]


def _network(network: Explained) -> dict[str, Any]:
    names = network.trained.readable_names
    best = np.argsort(-network.probabilities, axis=1, kind="stable")[:, :3]
    views: dict[str, Any] = {"cams": [_cam(network, layer) for layer in network.cams]}
    if network.gates:
        views["gates"] = [
            {"label": label(path), "shape": gate.shape[1:3], "options": _channels(gate)} for path, gate in network.gates.items()
        ]
    for part in ("informative", "redundant") if network.separations else ():
        views[part] = []
        for path, both in network.separations.items():
            maps = np.asarray(getattr(both, part))
            shown = {"label": label(path), "shape": maps.shape[1:3], "options": _channels(maps, np.asarray(both.informative))}
            views[part].append(shown)
    return {
        "name": network.trained.name,
        "images": [_image(image) for image in network.images],
        "answers": [
            [(plain(names[i]), round(float(share[i]), 4)) for i in row]
            for row, share in zip(best, network.probabilities, strict=True)
        ],
        "views": views,
        "fusions": [
            {"label": label(path), "channels": beta.shape[2], "data": _base64(beta.astype("<f4"))}
            for path, beta in network.fusions.items()
        ],
        "fields": [
            {
                "label": layer,
                "shape": field.shape,
                "extent": extent(field),
                "data": _base64(quantized(np.sqrt(field), 0, float(np.sqrt(field.max())))),
            }
            for layer, field in network.fields.items()
        ],
    }


def _cam(network: Explained, layer: str) -> dict[str, Any]:
    maps = network.cams[layer]  # (n, k, h, w)
    options = []
    for k in range(maps.shape[1]):
        texts = class_texts(network, k)
        same = len(set(network.classes[:, k].tolist())) == 1 and len(texts) > 1
        name = f"class {plain(network.trained.readable_names[network.classes[0, k]])}" if same else RANKS[min(k, len(RANKS) - 1)]
        pixels = np.stack([quantized(heat, 0, float(heat.max())) for heat in maps[:, k]])
        options.append({"label": name, "texts": texts, "each": True, "low": 0, "high": 1, "data": _base64(pixels)})
    return {"label": layer, "shape": maps.shape[2:], "options": options}


def _channels(maps: np.ndarray, varying: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Return the mean over the channels, then the single channels in which `varying` (else `maps`) varies most."""
    spread = np.nan_to_num((maps if varying is None else varying).var((1, 2))).mean(0)
    chosen = sorted(np.argsort(-spread, kind="stable")[:CHANNELS].tolist())
    options = []
    for channel in (None, *chosen):
        shown = maps.mean(-1) if channel is None else maps[..., channel]
        low, high = float(shown.min()), float(shown.max())
        name = f"mean of {maps.shape[-1]} channels" if channel is None else f"channel {channel}"
        options.append({"label": name, "low": low, "high": high, "data": _base64(quantized(shown, low, high))})
    return options


def _image(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    kind = "PNG" if max(image.shape) <= 64 else "JPEG"
    options = {"quality": 88} if kind == "JPEG" else {"optimize": True}
    return f"data:image/{kind.lower()};base64,{_base64(encoded(picture, kind, **options))}"


def _base64(values: np.ndarray | bytes) -> str:
    return base64.b64encode(values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()).decode()
