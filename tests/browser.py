"""Opens the pages that the project writes in headless Chromium. `open_page` is a fixture of every test, by conftest.py.

    def test_a_page(open_page):
        page = open_page(path, width=390)
        assert page.title() == "..."

At the end of the test, a console error, an uncaught exception, a failed request or a request to another machine is a failure.
"""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOCAL = {"127.0.0.1", "localhost"}
PHONE = 390


@pytest.fixture
def open_page():
    """Returns `open_page(target, *, width=1280, height=900, dark=False)`, which gives a page of Playwright.

    `target` is a file or an address of this machine. A page narrower than 600 px is that of a phone, which obeys the page's
    viewport. The browser starts at the first call, because Orbax cannot run in a thread in which Playwright's loop runs.
    """
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(CHROMIUM)}): install one to test the pages")
    problems: list[str] = []
    started = []

    def guard(route):
        address = urlsplit(route.request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in LOCAL:
            problems.append(f"request to {route.request.url}")
            route.abort()
        else:
            route.continue_()

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # the browser itself stops loading the icon when a page is left or loaded again
            problems.append(f"failed: {request.url} ({request.failure})")

    def open_(target, *, width=1280, height=900, dark=False):
        if not started:
            playwright = api.sync_playwright().start()
            started.append(playwright)
            started.append(playwright.chromium.launch(executable_path=program, args=["--no-sandbox"]))
        context = started[1].new_context(
            viewport={"width": width, "height": height},
            is_mobile=width < 600,
            has_touch=width < 600,
            color_scheme="dark" if dark else "light",
        )
        context.route("**/*", guard)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("requestfailed", failed)
        page.goto(target if "://" in str(target) else Path(target).resolve().as_uri())
        return page

    yield open_
    if started:
        started[1].close()
        started[0].stop()
    assert not problems, "; ".join(problems)


def assert_fits(page) -> None:
    """Fails if the page is wider than its window, and names the elements that are."""
    width = page.viewport_size["width"]  # `innerWidth` of a phone grows with the page
    wide = page.evaluate(
        """width => [...document.querySelectorAll('body *')].map(e => [e, Math.round(e.getBoundingClientRect().right)])
        .filter(([e, right]) => right > width).map(([e, right]) => `${e.tagName}.${e.className} ${right}`)""",
        width,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width, wide[:5]
