"""The fixture `open_page` finds what it must find: a broken page fails."""

import pytest

from tests.browser import PHONE, assert_fits
from tests.browser import open_page as fixture_of_pages

PAGE = "<!doctype html><meta name=viewport content='width=device-width'><title>A page</title><body>{}</body>"


def write(tmp_path, body):
    path = tmp_path / "page [1].html"
    path.write_text(PAGE.format(body))
    return path


def test_a_page_opens_at_phone_width_and_in_the_dark(open_page, tmp_path):
    path = write(tmp_path, "<p>text</p>")
    page = open_page(path, width=PHONE, dark=True)
    assert page.title() == "A page"
    assert page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [PHONE, True]
    assert_fits(page)
    assert open_page(path).evaluate("innerWidth") == 1280


def test_a_page_wider_than_its_window_is_found(open_page, tmp_path):
    page = open_page(write(tmp_path, "<div class=bar style='width:700px'>x</div>"), width=PHONE)
    with pytest.raises(AssertionError, match=r"DIV\.bar 70"):
        assert_fits(page)


def test_every_problem_of_a_page_is_reported(tmp_path):
    path = write(
        tmp_path,
        "<script>console.error('wrong')</script><script>nothing()</script>"
        "<img src='https://example.org/a.png'><img src='missing.png'>",
    )
    fixture = fixture_of_pages.__wrapped__()
    next(fixture)(path)
    with pytest.raises(AssertionError) as error:
        next(fixture)
    for problem in (
        "console: wrong",
        "uncaught: nothing is not defined",
        "request to https://example.org/a.png",
        "failed: file:",
    ):
        assert problem in str(error.value)
