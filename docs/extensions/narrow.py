"""Marks what a narrow screen cannot wrap: code with a word longer than a line, and table cells that hold sentences."""

from __future__ import annotations

from typing import Any

LINE = 36
"""Characters of code in a line at 390 px."""
SENTENCE = 24
"""Characters from which a cell keeps a readable width."""


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    from docutils import nodes

    def mark(_app: Any, doctree: Any, _page: str) -> None:
        for code in doctree.findall(nodes.literal):
            if max(map(len, code.astext().split()), default=0) > LINE:
                code["classes"].append("long")
        for cell in doctree.findall(nodes.entry):
            if len(cell.astext()) >= SENTENCE:
                cell["classes"].append("sentence")

    app.connect("doctree-resolved", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
