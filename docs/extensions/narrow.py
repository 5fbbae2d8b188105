"""Marks what a narrow screen must treat in its own way: long code words, short cells, cells of sentences, tables to stack."""

from __future__ import annotations

from typing import Any

LINE = 36
"""Characters of code in a line at 390 px."""
SENTENCE = 24
"""Characters from which a cell keeps a readable width."""
SHORT = 13
"""Characters up to which a cell stays on one line: `3.5e-15` and `ResNet-101` have a hyphen, where a browser would break them."""


PHONE = 44
"""Characters of a table in a line at 390 px."""


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    from docutils import nodes

    def words(node: Any) -> int:
        return max(map(len, node.astext().split()), default=0)

    def mark(_app: Any, doctree: Any, _page: str) -> None:
        for code in doctree.findall(nodes.literal):
            if words(code) > LINE:
                code["classes"].append("long")
        for cell in doctree.findall(nodes.entry):
            length = len(cell.astext())
            if length >= SENTENCE or length <= SHORT:
                cell["classes"].append("sentence" if length >= SENTENCE else "short")
        for table in doctree.findall(nodes.table):
            rows = [list(row.findall(nodes.entry)) for row in table.findall(nodes.row)]
            has_defaults = len(rows[0]) == 3 and rows[0][1].astext() == "default"
            widths = [
                max(max(words(cell), 16 if "sentence" in cell["classes"] else 0) for cell in column)
                for column in zip(*rows, strict=True)
            ]
            if has_defaults or (len(rows[0]) == 2 and sum(widths) > PHONE):
                table["classes"] += ["stack", "defaults"] if has_defaults else ["stack"]

    app.connect("doctree-resolved", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
