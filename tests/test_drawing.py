"""The drawing page: a one and a zero, drawn with the mouse and with a finger, in headless Chromium."""

import functools
import http.server
import importlib.util
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.browser import PHONE, assert_fits

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extra" / "draw"


def module(name):
    spec = importlib.util.spec_from_file_location(f"drawing_{name}", ROOT / "docs" / "drawing" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page on a plain server."""
    runtime = module("runtime")
    if reason := runtime.copy_runtime():
        pytest.skip(f"the drawing page needs ONNX Runtime from npm: {reason}")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PAGE, folder / "draw")
    (folder / "export.html").write_text("<!doctype html><title>Export</title>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/draw/"
    server.shutdown()
    server.server_close()


ONE = [[(0.52, 0.15), (0.52, 0.85)]]
ZERO = [[(0.5 + 0.2 * np.cos(t), 0.5 + 0.33 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 40)]]


def draw(page, lines):
    box = page.locator("#pad").bounding_box()
    for line in lines:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=4)
        page.mouse.up()


def touch(page, lines):
    """Draw with a finger: events of the browser's own protocol, which scroll the page if the canvas does not prevent it."""
    client, box = page.context.new_cdp_session(page), page.locator("#pad").bounding_box()
    for line in lines:
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in line]
        client.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points[:1]})
        for point in points[1:]:
            client.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        client.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def answer(page, digit):
    page.wait_for_function(f"document.querySelector('#answer').textContent.startsWith('It is a {digit}')", timeout=60000)
    shares = [float(text.split()[0]) for text in page.locator("#bars .share").all_text_contents()]
    assert len(shares) == 10
    assert abs(sum(shares) - 100) < 1
    assert max(shares) == shares[digit] > 50
    for name, side in (("image", 32), ("layer1", 32), ("layer2", 16), ("layer3", 8)):
        pixels = page.evaluate(
            f"""() => {{ const c = document.querySelector('#map-{name} canvas');
            return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }}"""
        )
        assert pixels[:2] == [side, side]
        assert len({tuple(pixels[i : i + 3]) for i in range(2, len(pixels), 4)}) > 5, f"{name} is empty"


@pytest.mark.parametrize(("width", "use"), [(1280, draw), (PHONE, touch)])
def test_a_one_and_a_zero(address, open_page, width, use):
    page = open_page(address, width=width)
    page.wait_for_selector("body[data-ready]", timeout=120000)
    assert page.locator("#answer").text_content() == "Draw a digit from 0 to 9."
    assert_fits(page)
    use(page, ONE)
    answer(page, 1)
    page.click("#clear")
    page.wait_for_function("document.querySelector('#answer').textContent.startsWith('Draw a digit')")
    assert page.locator("#bars .share").all_text_contents() == [""] * 10
    use(page, ZERO)
    answer(page, 0)
    assert page.evaluate("scrollY") == 0


def test_from_disk_the_page_says_what_to_do(open_page):
    """Browsers do not load modules from disk, so this text stands in the page itself."""
    page = open_page(PAGE / "index.html")
    assert "python -m http.server" in page.locator("#answer").text_content()


def test_the_network_of_the_page():
    """It is small enough to stand in the repository, and knows the scans of the data set."""
    path = PAGE / "digits.onnx"
    assert path.stat().st_size < 1_500_000
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    scans, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    answers = [session.run(["probabilities"], {"scan": scan.reshape(8, 8).astype(np.float32)})[0].argmax() for scan in scans[::9]]
    assert np.mean(np.equal(answers, labels[::9])) > 0.97


def test_without_npm_the_reason_is_said(monkeypatch, tmp_path):
    runtime = module("runtime")
    monkeypatch.setattr(runtime, "RUNTIME", tmp_path / "runtime")
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    assert runtime.copy_runtime() == "npm is not installed"
