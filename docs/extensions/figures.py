"""Puts the drawings in `figures/` into the page itself, so that they follow the page's light or dark colours.

Wide pictures get a class: on a narrow screen they keep a width at which their text can be read, and scroll.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[1] / "figures"
WIDE = 700
"""Pixels of a PNG file, which has its width in bytes 16 to 20."""


def inline(path: Path, description: str) -> str:
    """Return the SVG of a drawing for a page: without its own colours, which `static/site.css` gives, with a description."""
    svg = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.DOTALL)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
    return f'<div class="drawing" tabindex="0">{svg}</div>'


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    from docutils import nodes

    def replace(app: Any, doctree: Any, _: str) -> None:
        for image in list(doctree.findall(nodes.image)):
            path = FIGURES / Path(image["uri"]).name
            if app.builder.format == "html" and path.suffix == ".svg" and path.is_file():
                image.replace_self(nodes.raw("", inline(path, image.get("alt", "")), format="html"))
            elif path.suffix == ".png" and path.is_file() and int.from_bytes(path.read_bytes()[16:20], "big") > WIDE:
                image["classes"].append("wide")

    app.connect("doctree-resolved", replace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
