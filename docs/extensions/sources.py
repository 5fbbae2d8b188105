"""Pages of source files, and the pages that stand at the root of the repository.

A link from a page to a file of the repository outside `docs/` becomes a link to a page with the file's text, and a link to a
folder one to its `__init__.py`. A page may consist of the marker `<!-- page: ../CONTRIBUTING.md -->`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!\!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
PAGE = re.compile(r"^<!-- page: (\S+) -->$", re.MULTILINE)
# Files at the root that are pages of the site.
AT_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}


def rewrite(text: str, page: str) -> str:
    """Return the text of a page of the site with its links to files outside `docs/` replaced."""
    base = ROOT / "docs" / page
    found = PAGE.search(text)
    if found:
        base = (base.parent / found[1]).resolve()
        text = text.replace(found[0], base.read_text().replace("docs/figures", "figures"))
    here = (ROOT / "docs" / page).parent

    def replace(link: re.Match[str]) -> str:
        target = (base.parent / link[2]).resolve()
        fragment = link[3] or ""
        if target.is_relative_to(ROOT / "docs"):
            return f"[{link[1]}]({os.path.relpath(target, here)}{fragment})"
        path = str(target.relative_to(ROOT))
        if path in AT_ROOT:
            return f"[{link[1]}]({os.path.relpath(ROOT / 'docs' / AT_ROOT[path], here)}{fragment})"
        if target.is_dir():
            path += "/__init__.py"
        if not (ROOT / path).is_file():
            return link[1]
        return f"[{link[1]}](page:{'../' * page.count('/')}sources/{path}.html)"

    return LINK.sub(replace, text)


def linked_files(text: str) -> set[str]:
    """Return the files of the repository whose pages a page links to."""
    return set(re.findall(r"sources/([\w./-]+?)\.html", text))


def _pages(app: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import TextLexer, get_lexer_for_filename
    from pygments.util import ClassNotFound

    for path in sorted(set().union(*app.env.source_files.values())):
        try:
            lexer = get_lexer_for_filename(path)
        except ClassNotFound:
            lexer = TextLexer()
        body = highlight((ROOT / path).read_text(), lexer, HtmlFormatter(lineanchors="L"))
        yield f"sources/{path}", {"title": path, "body": f"<h1><code>{path}</code></h1>\n{body}"}, "page.html"


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""

    def replace_links(app: Any, page: str, source: list[str]) -> None:
        source[0] = rewrite(source[0], f"{page}.md")
        if page in ("contributing", "changelog"):
            app.env.note_dependency(str(ROOT / f"{page.upper()}.md"))

    def collect(app: Any, page: str, source: list[str]) -> None:
        if not hasattr(app.env, "source_files"):
            app.env.source_files = {}
        app.env.source_files[page] = linked_files(source[0])

    app.connect("source-read", replace_links, priority=400)  # before the reference writes its entries
    app.connect("source-read", collect, priority=600)  # after it
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
