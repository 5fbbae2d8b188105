"""Marks what must not wrap, or not anywhere: code with a word longer than a line, short table cells, and cells of sentences."""

from __future__ import annotations

from typing import Any

LINE = 36
"""Characters of code in a line at 390 px."""
SENTENCE = 24
"""Characters from which a cell keeps a readable width."""
SHORT = 13
"""Characters up to which a cell stays on one line: `3.5e-15` and `ResNet-101` have a hyphen, where a browser would break them."""


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    from docutils import nodes

    def mark(_app: Any, doctree: Any, _page: str) -> None:
        for code in doctree.findall(nodes.literal):
            if max(map(len, code.astext().split()), default=0) > LINE:
                code["classes"].append("long")
        for cell in doctree.findall(nodes.entry):
            length = len(cell.astext())
            if length >= SENTENCE or length <= SHORT:
                cell["classes"].append("sentence" if length >= SENTENCE else "short")

    app.connect("doctree-resolved", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
