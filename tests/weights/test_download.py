"""Downloads from an HTTP server on this machine that misbehaves on demand."""

import concurrent.futures
import errno
import hashlib
import http.server
import io
import os
import re
import socket
import sys
import threading
import time

import numpy as np
import pytest

from scconv_jax.interop.loading import open_checkpoint
from scconv_jax.models.registry import PUBLISHED
from scconv_jax.weights import download
from scconv_jax.weights.download import fetch
from scconv_jax.weights.files import WeightsError
from tests import weight_files as made

CONTENT = bytes(range(256)) * 4096  # 1 MiB
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every path; each attribute is one way to misbehave."""

    daemon_threads = True
    content = CONTENT
    etag: str | None = '"1"'
    ranges = True  # answers a Range
    length = True  # says how long the file is
    stop_after: int | None = None  # bytes, then the connection is closed
    stall_after: int | None = None  # bytes, then nothing more comes
    status: int | None = None
    redirect: str | None = None
    encoding: str | None = None
    pause = 0.0  # seconds before each piece

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []  # the Range of each

    def handle_error(self, request, client_address):
        """Clients hang up when they have seen enough."""

    def address(self, name=NAME, scheme="http"):
        return f"{scheme}://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers["Range"])
        if server.redirect is not None:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            return self.end_headers()
        if server.status is not None:
            return self.send_error(server.status)
        content, start = server.content, 0
        if server.ranges and self.headers["Range"]:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.encoding:
            self.send_header("Content-Encoding", server.encoding)
        self.end_headers()
        stop = len(content)
        for limit in (server.stop_after, server.stall_after):
            stop = min(stop, start + limit) if limit is not None else stop
        for at in range(start, stop, 1 << 16):
            time.sleep(server.pause)
            self.wfile.write(content[at : min(stop, at + (1 << 16))])
        if server.stall_after is not None:
            time.sleep(2)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def visible(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_once_and_from_then_on_from_the_cache(server, tmp_path):
    path = fetch(server.address(), cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert fetch(server.address(), cache=tmp_path) == path
    assert server.requests == [None]
    assert visible(tmp_path) == [NAME]


def test_a_cache_that_only_another_user_can_write_is_read(server, tmp_path, monkeypatch):
    """As in a container, whose image holds the weights."""

    def locked(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = fetch(server.address(), cache=tmp_path)
    monkeypatch.setattr(download, "_locked", locked)
    assert fetch(server.address(), cache=tmp_path) == path
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(
        WeightsError, match=r"cannot be stored in .*: Permission denied\. SCCONV_JAX_CACHE sets another folder\.$"
    ):
        fetch(server.address(), cache=tmp_path)


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    path = fetch(server.address(), cache=tmp_path)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch(server.address(), cache=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("page", [b"", b"<html>Log in first</html>", b"PK\3\4 and no more"])
def test_a_download_that_cannot_be_used_is_not_kept(server, tmp_path, monkeypatch, page):
    """A hotel's login page, stored as a file without a hash in its name, must not block later downloads."""
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path))
    server.content = page
    with pytest.raises(WeightsError, match=r"model\.pth cannot be used: it"):
        open_checkpoint(server.address("model.pth"))
    assert visible(tmp_path) == []
    server.content, server.etag = made.state_dict_file("zip", {"w": np.ones(3, np.float32)}), '"2"'
    assert list(open_checkpoint(server.address("model.pth")).arrays) == ["w"]
    assert visible(tmp_path) == ["model.pth"]


def test_where_the_cache_is(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path / "own"))
    assert fetch(server.address()) == tmp_path / "own" / NAME
    monkeypatch.delenv("SCCONV_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(server.address()) == tmp_path / "xdg" / "scconv_jax" / NAME


def test_the_published_checkpoints_by_name(tmp_path):
    """A file that somebody put into the cache by hand is found there under its published name, if its hash is right."""
    for name, address in PUBLISHED.items():
        assert re.fullmatch(rf"https://\S+/{name}-[0-9a-f]{{8}}\.pth", address)
    assert download._cache_path(PUBLISHED["scnet50"], tmp_path, PUBLISHED) == tmp_path / "scnet50-dc6a7e87.pth"


def test_equal_names_of_different_addresses_do_not_meet(server, tmp_path):
    first = fetch(server.address("a/model.pth"), cache=tmp_path)
    server.content = b"other"
    second = fetch(server.address("b/model.pth?key=1"), cache=tmp_path)
    assert first.name == second.name == "model.pth"
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, b"other")


@pytest.mark.parametrize("name", ["..%2f..%2fevil.pth", "%2e%2e", "a%00b.pth", ".bashrc", "x" * 500 + ".pth", ""])
def test_no_address_leads_out_of_the_cache(server, tmp_path, name):
    path = fetch(server.address(name), cache=tmp_path / "cache")
    assert path.resolve().is_relative_to(tmp_path / "cache")
    assert not path.name.startswith(".")
    assert path.read_bytes() == CONTENT


def test_a_cut_transfer_is_no_file_and_is_taken_up_again(server, tmp_path):
    server.stop_after = 300_000
    with pytest.raises(WeightsError, match=r"ended at 300,000 of 1,048,576 bytes. Try again .*by hand"):
        fetch(server.address(), cache=tmp_path)
    assert visible(tmp_path) == [f"{NAME}.part", f"{NAME}.part.version"]
    server.stop_after = None
    assert fetch(server.address(), cache=tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-"]
    assert visible(tmp_path) == [NAME]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize(
    "change",
    [{"etag": '"2"', "content": CONTENT[::-1]}, {"content": CONTENT[::-1] + b"more"}, {"content": CONTENT[:1000]}],
    ids=["another version", "longer", "shorter than what came"],
)
def test_another_file_by_then_is_fetched_from_its_start(server, tmp_path, ranges, change):
    address = server.address("model.pth")
    server.stop_after = 300_000
    with pytest.raises(WeightsError):
        fetch(address, cache=tmp_path)
    server.stop_after, server.ranges = None, ranges
    for name, value in change.items():
        setattr(server, name, value)
    assert fetch(address, cache=tmp_path).read_bytes() == change["content"]
    assert visible(tmp_path) == ["model.pth"]


def test_a_file_without_version_and_hash_is_not_continued(server, tmp_path):
    server.etag, server.stop_after = None, 300_000
    with pytest.raises(WeightsError):
        fetch(server.address("model.pth"), cache=tmp_path)
    server.stop_after, server.content = None, CONTENT[::-1]
    assert fetch(server.address("model.pth"), cache=tmp_path).read_bytes() == CONTENT[::-1]
    assert server.requests == [None, None]


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.stop_after, server.ranges = 300_000, False
    with pytest.raises(WeightsError):
        fetch(server.address(), cache=tmp_path)
    server.stop_after = None
    assert fetch(server.address(), cache=tmp_path).read_bytes() == CONTENT


def test_another_hash_than_that_of_the_name(server, tmp_path):
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(
        WeightsError, match=r"SHA-256 mismatch: expected [0-9a-f]{8}…, got [0-9a-f]{8}…; the download was deleted\.$"
    ):
        fetch(server.address(), cache=tmp_path)
    assert visible(tmp_path) == []


def test_a_server_that_stops_answering(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.stall_after = 100_000
    start = time.monotonic()
    with pytest.raises(WeightsError, match="timed out"):
        fetch(server.address(), cache=tmp_path)
    assert time.monotonic() - start < 2
    server.stall_after = None
    assert fetch(server.address(), cache=tmp_path).read_bytes() == CONTENT
    assert server.requests[1].startswith("bytes=")


@pytest.mark.parametrize(
    ("status", "words"), [(404, "404 Not Found"), (500, "500 Internal Server Error"), (403, "403 Forbidden")]
)
def test_errors_of_the_server_are_one_line(server, tmp_path, status, words):
    server.status = status
    with pytest.raises(WeightsError, match=rf"^http://127\S+{NAME} cannot be downloaded: the server says {words}\.$"):
        fetch(server.address(), cache=tmp_path)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x.pth", "data:,x", "gopher://127.0.0.1/"])
def test_redirects_to_what_is_no_web_address(server, tmp_path, target):
    server.redirect = target
    with pytest.raises(WeightsError, match=r"(?i)redirect(ed|ion) to (url ')?" + re.escape(target)):
        fetch(server.address(), cache=tmp_path)
    assert visible(tmp_path) == []


def test_redirects_in_a_circle(server, tmp_path):
    server.redirect = server.address()
    with pytest.raises(WeightsError, match="302"):
        fetch(server.address(), cache=tmp_path)
    assert len(server.requests) < 20


def test_a_redirect_to_another_server(server, tmp_path):
    with Server() as other:
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.redirect = other.address("elsewhere")
        assert fetch(server.address(), cache=tmp_path).name == NAME
        other.shutdown()


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(WeightsError, match="refused"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/{NAME}", cache=tmp_path)


def test_a_file_of_unknown_length_needs_a_hash(server, tmp_path):
    server.length = False
    assert fetch(server.address(), cache=tmp_path).read_bytes() == CONTENT
    with pytest.raises(WeightsError, match="does not say how long"):
        fetch(server.address("model.pth"), cache=tmp_path)


def test_too_long_and_compressed_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(WeightsError, match=r"it has 1,048,576 bytes; the limit is 1,000"):
        fetch(server.address(), cache=tmp_path)
    server.length = False
    with pytest.raises(WeightsError, match=r"more than 1,000 bytes"):
        fetch(server.address(), cache=tmp_path)
    server.encoding = "gzip"
    with pytest.raises(WeightsError, match="compressed"):
        fetch(server.address(), cache=tmp_path)


@pytest.mark.parametrize(
    "source",
    ["scnet5O", "file:///etc/passwd", "ftp://host/x.pth", "http://", "http://[::1/x.pth", "", "http://a b/x", "http://a/\r\nx"],
)
def test_a_source_that_is_neither_a_name_nor_an_address(source, tmp_path):
    with pytest.raises(WeightsError, match=r"neither a published checkpoint \(scnet50, scnet101, scnet50_v1d\) nor an http"):
        fetch(source, published=PUBLISHED, cache=tmp_path)


def test_the_nearest_name_is_given(tmp_path):
    with pytest.raises(WeightsError, match=r"Did you mean 'scnet101'\?"):
        fetch("scnet-101", published=PUBLISHED, cache=tmp_path)


def test_a_cache_that_is_no_folder(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be stored in"):
        fetch(server.address(), cache=tmp_path / "file")


def test_keys_in_an_address_are_not_shown(server, tmp_path):
    server.status = 403
    with pytest.raises(WeightsError) as error:
        fetch(server.address() + "?key=secret", cache=tmp_path)
    assert "secret" not in str(error.value)


def test_several_at_once(server, tmp_path):
    """Threads, for speed: the lock belongs to the open file and separates threads as it does processes."""
    server.pause = 0.02
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: fetch(server.address(), cache=tmp_path), range(3)))
    assert paths == [tmp_path / NAME] * 3
    assert server.requests == [None]
    assert paths[0].read_bytes() == CONTENT
    assert visible(tmp_path) == [NAME]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_the_bar_is_for_terminals(server, tmp_path, monkeypatch, stream, progress, shown):
    server.pause = 0.02
    monkeypatch.setattr(sys, "stderr", stream())
    fetch(server.address(), cache=tmp_path, progress=progress)
    assert ("net-" in sys.stderr.getvalue()) is shown


def test_without_stderr(server, tmp_path, monkeypatch):
    """As Python sets it if the stream is closed."""
    monkeypatch.setattr(sys, "stderr", None)
    assert fetch(server.address(), cache=tmp_path).read_bytes() == CONTENT


def test_the_bar_on_a_terminal_of_ascii(server, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", line_buffering=True)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(server.address(), cache=tmp_path)
    assert b"net-" in terminal.buffer.getvalue()
