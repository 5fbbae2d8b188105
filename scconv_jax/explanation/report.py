"""The files that `explain` writes: one page, and PNG files of the same."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scconv_jax import files
from scconv_jax.explanation.explained import Explained, extent
from scconv_jax.explanation.page import class_texts, label, page
from scconv_jax.explanation.pictures import Row, bars, coloured, overlay, sheet, tile

PAGE = "explain.html"
PAGES = (".html", ".htm")
"""Suffixes of a page."""
ACROSS = 8
"""Most images beside each other in the comparison of two networks."""


def build(names: Sequence[str], networks: Sequence[Explained], *, option: int = 0, source: str = "") -> dict[str, bytes]:
    """Return the contents of all files by their names, which depend on nothing that a user gives.

    Args:
        names: Name of each image.
        networks: One network, or two to be compared on the same images.
        option: Position, among the explained classes, of the one in the pictures.
        source: Where the weights came from, for the page.
    """
    first = networks[0]
    title = " and ".join(dict.fromkeys(network.trained.name for network in networks))
    count = "1 image" if len(names) == 1 else f"{len(names)} images"
    html = page(names, networks, title=f"What {title} {'see' if ' and ' in title else 'sees'} in {count}", summary=source)
    found = {PAGE: html.encode(), "grad_cam.png": _grad_cam(names, first, option)}
    if len(networks) == 2:
        found["beside.png"] = _beside(names, networks, option)
    if first.gates:
        found["gates.png"] = _gates(names, first)
    if first.separations:
        found["sru.png"] = _separations(names, first)
    if first.fusions:
        found["cru.png"] = _fusions(first)
    found["receptive_fields.png"] = _fields(networks)
    return found


def write(out: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write all files to the folder `out`, or only the page if `out` ends in .html. After an error, none of them is there.

    Returns:
        Their paths.

    Raises:
        OSError: A folder or file cannot be written.
    """
    if out.suffix.lower() in PAGES:
        targets = {out: contents[PAGE]}
        made = []
    else:
        targets = {out / name: content for name, content in contents.items()}
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        if made:
            out.mkdir(parents=True)
        with contextlib.ExitStack() as stack:  # each file takes its place when all are complete
            for path, content in targets.items():
                stack.enter_context(files.replacing(path)).write_bytes(content)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return list(targets)


def _grad_cam(names: Sequence[str], network: Explained, option: int) -> bytes:
    texts = class_texts(network, option)
    rows = [
        Row(
            (name, *text.rsplit(" ", 2)[:1], " ".join(text.rsplit(" ", 2)[1:])),
            [tile(network.images[i]), *(overlay(network.images[i], maps[i, option]) for maps in network.cams.values())],
        )
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    return sheet(
        f"Grad-CAM of {network.trained.name}",
        ["image", *network.cams],
        rows,
        "Where each stage sees the class. Light: much; dark: not at all. Each map has its own scale.",
    )


def _beside(names: Sequence[str], networks: Sequence[Explained], option: int) -> bytes:
    some = range(min(ACROSS, len(names)))
    layers = [list(network.cams)[-1] for network in networks]
    rows = [Row(("image",), [tile(networks[0].images[i]) for i in some])]
    for network, layer in zip(networks, layers, strict=True):
        tiles = [overlay(network.images[i], network.cams[layer][i, option]) for i in some]
        rows.append(Row((network.trained.name, f"Grad-CAM, {layer}"), tiles))
    columns = [class_texts(networks[0], option)[i].rsplit(" ", 2)[0] for i in some]
    return sheet(
        "Grad-CAM of two networks for the same classes",
        columns,
        rows,
        "Both networks are asked for the class above the image. Light: much; dark: not at all. Each map has its own scale.",
    )


def _last_blocks(paths: Sequence[str]) -> list[str]:
    """Return the last path of each stage."""
    return list({path.split("/")[0]: path for path in paths}.values())


def _gates(names: Sequence[str], network: Explained) -> bytes:
    shown = _last_blocks(list(network.gates))
    means = {path: network.gates[path].mean(-1) for path in shown}
    ranges = {path: (float(mean.min()), float(mean.max())) for path, mean in means.items()}
    rows = [
        Row((name,), [tile(network.images[i]), *(coloured(mean[i], *ranges[path]) for path, mean in means.items())])
        for i, name in enumerate(names)
    ]
    text = "; ".join(f"{label(path)}: {low:.2f} to {high:.2f}" for path, (low, high) in ranges.items())
    return sheet(
        f"Calibration gates of {network.trained.name}",
        ["image", *map(label, shown)],
        rows,
        f"sigmoid(X1 + X1') of the last block of each stage, mean over the channels. From dark to light: {text}.",
    )


def _separations(names: Sequence[str], network: Explained) -> bytes:
    columns, parts, largest = ["image"], [], []
    for path in _last_blocks(list(network.separations)):
        both = [np.asarray(part).mean(-1) for part in network.separations[path]]
        parts += both
        stage = path.split("/")[0]
        columns += [f"{stage}, W1 · X", f"{stage}, W2 · X"]
        largest.append(f"{stage} {both[0].max():.2g} and {both[1].max():.2g}")
    rows = [
        Row(
            (name,),
            [tile(network.images[i]), *(coloured(part[i], float(part[i].min()), float(part[i].max())) for part in parts)],
        )
        for i, name in enumerate(names)
    ]
    return sheet(
        f"Informative and redundant maps of {network.trained.name}",
        columns,
        rows,
        "W1 · X and W2 · X of the SRU in the last block of each stage, mean over the channels. Each picture has its own scale. "
        f"Largest values: {'; '.join(largest)}.",
    )


def _fusions(network: Explained) -> bytes:
    shown = {path: network.fusions[path].mean(0) for path in _last_blocks(list(network.fusions))}
    highs = {path: float(beta.sum(0).max()) for path, beta in shown.items()}
    return sheet(
        f"Channel weights of {network.trained.name}",
        [label(path) for path in shown],
        [Row(("beta 1: blue", "beta 2: orange", "by channel"), [bars(beta, highs[path]) for path, beta in shown.items()])],
        "The weights beta 1 and beta 2 of the CRU in the last block of each stage, mean over the images, one bar for each "
        "channel. Full height: " + ", ".join(f"{high:.2g}" for high in highs.values()) + ".",
    )


def _fields(networks: Sequence[Explained]) -> bytes:
    columns = list(max((network.fields for network in networks), key=len))
    rows = []
    for network in networks:
        fields = network.fields.values()
        sizes = " / ".join(str(extent(field)) for field in fields)
        tiles = [coloured(np.sqrt(field), 0, float(np.sqrt(field.max()))) for field in fields]
        rows.append(Row((network.trained.name, "90 % within", f"{sizes} px"), tiles))
    return sheet(
        "Effective receptive fields",
        columns,
        rows,
        "Absolute gradient of the central pixel of each stage's map by the pixels of the image, averaged over images and "
        "channels; brightness is its square root.",
    )
