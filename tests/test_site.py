"""The documentation as a site: it builds without a warning, no link is dead, and every page works in a browser, from disk.

`SITE=site` tests the site that `make docs` has built. Otherwise the tests build one.
"""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import scconv_jax
from tests.browser import PHONE, assert_fits

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md"))
# Code words of the text that stand on more than one line, outside what scrolls by itself.
BROKEN_WORDS = """() => [...document.querySelectorAll('article code .pre, article td code')].filter(word =>
    !word.textContent.includes(' ') && new Set([...word.getClientRects()].map(box => Math.round(box.top))).size > 1
).map(word => word.textContent)"""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. Any warning is an error, as in `make docs`."""
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    if built := os.environ.get("SITE"):
        return Path(built)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-d", folder / "doctrees"]
    done = subprocess.run([*command, ROOT / "docs", folder / "html"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


class _Page(HTMLParser):
    """The identifiers of a page, and the addresses that it links to or loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        if tag in ("script", "link", "img", "iframe") and "rel" not in attributes:
            for name in ("href", "src"):
                assert "://" not in attributes.get(name, ""), f"{tag} loads {attributes[name]}"


def test_no_link_or_anchor_is_dead(site):
    pages = {path.resolve(): _Page(path) for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target in pages
            anchor = not parts.fragment or not known or unquote(parts.fragment) in pages[target].ids | {"top", ""}
            if not target.is_file() or not anchor:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead


def test_every_public_name_stands_in_the_built_reference(site):
    ids = set().union(*(_Page(path).ids for path in (site / "reference").glob("*.html")))
    for module in (scconv_jax, scconv_jax.functional, scconv_jax.layers, scconv_jax.models):
        for name in module.__all__:
            home = scconv_jax if name in scconv_jax.__all__ else module
            assert f"{home.__name__}.{name}" in ids or hasattr(getattr(module, name), "__path__") or name in MODULES, name


MODULES = {name for name in scconv_jax.__all__ if type(getattr(scconv_jax, name)).__name__ == "module"}


def _first_paint(page):
    """The milliseconds from opening the page to its first text or picture."""
    page.wait_for_function(FIRST_PAINT)
    return page.evaluate(FIRST_PAINT)


@pytest.mark.parametrize("width", [1280, PHONE])
def test_every_page_works_from_disk(site, open_page, width):
    page = open_page(site / "index.html", width=width, dark=width == PHONE)
    for name in PAGES:
        page.goto((site / f"{name}.html").resolve().as_uri())
        assert_fits(page)
        assert page.evaluate(BROKEN_WORDS) == [], name
        paints = [_first_paint(page)]
        while min(paints) >= 1000 and len(paints) < 5:  # another process may have had the processor
            page.reload()
            paints.append(_first_paint(page))
        assert min(paints) < 1000, f"{name}: first paint after {min(paints):.0f} ms"


def test_search_works_from_disk(site, open_page):
    page = open_page(site / "index.html")
    page.fill(".sidebar-search", "ScConv")
    page.press(".sidebar-search", "Enter")
    page.wait_for_selector("#search-results li a")
    links = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.getAttribute('href'))")
    assert any("reference/scconv_jax.html" in link for link in links)
    page.click("#search-results li a")
    page.locator("article h1").wait_for()


def test_code_can_be_copied(site, open_page):
    page = open_page(site / "operators.html")
    assert page.locator("button.copybtn").count() == page.locator("article div.highlight").count() > 0


def test_what_is_dead_or_left_out_fails_the_build(tmp_path):
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    (tmp_path / "conf.py").write_text("extensions = ['myst_parser']\nmyst_heading_anchors = 4\n")
    (tmp_path / "index.md").write_text("# Start\n\n[x](nowhere.md) [y](index.md#not-here)\n")
    (tmp_path / "alone.md").write_text("# Alone\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", tmp_path, tmp_path / "html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    for problem in ("nowhere.md", "not-here", "isn't included in any toctree"):
        assert problem in done.stderr


def test_the_text_of_a_drawing_stands_in_the_middle_of_its_box(site, open_page):
    """A drawing in a page has its style from the site: its own would ignore the switch of light and dark."""
    page = open_page(site / "papers.html")
    shift = page.evaluate("""() => {
        const box = document.querySelector('.drawing rect').getBoundingClientRect()
        const text = document.querySelector('.drawing text').getBoundingClientRect()
        return Math.abs(box.left + box.right - text.left - text.right) / 2
    }""")
    assert shift < 2
