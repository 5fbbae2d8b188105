"""Weights by name or address: downloaded once into a cache, whole and with the right hash or not at all."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from scconv_jax.weights.files import WeightsError, sha256

TIMEOUT = 30.0
"""Seconds without a byte after which a transfer is given up."""

MOST_BYTES = 16 << 30

_CHUNK = 1 << 20


def fetch(
    source: str,
    *,
    published: Mapping[str, str] = MappingProxyType({}),
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Download weights, unless they are in the cache already.

    An interrupted transfer is kept beside, and taken up by the next call where the server still has the same file. Where
    two processes fetch the same file, one waits for the other (but on Windows, which lacks `fcntl`).

    Args:
        source: A name in `published`, or an http or https address.
        published: Address of each file that can be asked for by name.
        cache: folder for the files; by default `SCCONV_JAX_CACHE`, else `scconv_jax` in the user's cache folder
            (`XDG_CACHE_HOME`, else `~/.cache`).
        progress: show a progress bar, where standard error is a terminal.

    Returns:
        The file on this machine. Where its name ends in eight hex digits (`scnet50-dc6a7e87.pth`), its SHA-256 begins
        with them. Any other file, once there, is not compared with the server's again.

    Raises:
        WeightsError: no such name or address, an interrupted transfer, or a file with another hash, which is removed.
    """
    address = published.get(source, source)
    path = _place(address, Path(cache) if cache is not None else _cache(), published)
    shown = address.partition("?")[0]  # what comes after may be a key
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not (path.exists() and _has_its_hash(path, path.name)):
                part = path.with_name(path.name + ".part")
                _transfer(address, part, path.name, progress)
                if not _has_its_hash(part, path.name):
                    found = sha256(part)
                    _forget(part)
                    raise WeightsError(f"its SHA-256 begins with {found[:8]}, not as its name says; what came was removed")
                part.replace(path)
                _forget(part)
    except WeightsError as error:
        raise WeightsError(f"{shown} cannot be downloaded: {error}.") from error
    except urllib.error.HTTPError as error:
        error.close()
        raise WeightsError(f"{shown} cannot be downloaded: the server says {error.code} {_line(error.reason)}.") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = _line(getattr(error, "reason", None) or error or type(error).__name__)
        raise WeightsError(
            f"{shown} cannot be downloaded: {reason}. Try again (what has come is kept), "
            f"or put the file into {path.parent} by hand."
        ) from error
    except OSError as error:
        raise WeightsError(f"{shown} cannot be kept in {path.parent}: {error.strerror or error}.") from error
    return path


def _place(address: str, cache: Path, published: Mapping[str, str]) -> Path:
    """Return the path in the cache of the file at an address."""
    try:
        parts = urllib.parse.urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and address.isascii() and not re.search(r"\s", address)
    except ValueError:
        parts, valid = urllib.parse.SplitResult("", "", "", "", ""), False
    if not valid:
        nearest = difflib.get_close_matches(address, published, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise WeightsError(
            f"{address!r:.200} is neither a published checkpoint ({', '.join(published)}) nor an http or https address, "
            f"and no file or folder here.{hint}"
        )
    name = urllib.parse.unquote(parts.path.rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", name).lstrip(".")[-120:] or "weights"
    if _hash_in(name):
        return cache / name
    return cache / hashlib.sha256(address.encode()).hexdigest()[:12] / name  # names like model.pth are many servers'


def _cache() -> Path:
    if own := os.environ.get("SCCONV_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scconv_jax"


def _hash_in(name: str) -> str | None:
    found = re.search(r"-([0-9a-f]{8})$", name.partition(".")[0])
    return found[1] if found else None


def _has_its_hash(path: Path, name: str) -> bool:
    start = _hash_in(name)
    return start is None or sha256(path).startswith(start)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process fetches the same file."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _transfer(address: str, part: Path, name: str, progress: bool) -> None:
    """Bring the partial file to its full length: by what it lacks, if the server still has the file that it is a part of."""
    version_path = _version_path(part)
    kept = version_path.read_text() if part.exists() and version_path.exists() else ""
    have = part.stat().st_size if kept else 0
    with _open(address, have) as response:
        version, total = _version(response), _total(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise WeightsError("it is sent compressed, which was not asked for")
        if response.status == 206 and have and version == kept and _first(response) == have:
            return _receive(response, part, have, total, name, progress)
        if response.status == 200:
            _forget(part)
            # With neither of these, only a hash in its name could tell later that the rest is of the same file.
            if response.headers["ETag"] or response.headers["Last-Modified"] or _hash_in(name):
                version_path.write_text(version)
            return _receive(response, part, 0, total, name, progress)
        if not have:
            raise WeightsError(f"the server answers {response.status} {_line(response.reason)}")
    _forget(part)
    return _transfer(address, part, name, progress)


def _receive(response: Any, part: Path, have: int, total: int | None, name: str, progress: bool) -> None:
    if total is None and not _hash_in(name):
        raise WeightsError("the server does not say how long it is, so that a part of it would look like the whole")
    most = MOST_BYTES if total is None else total
    if most > MOST_BYTES:
        raise WeightsError(f"it has {total:,} bytes; at most {MOST_BYTES:,} are fetched")
    with part.open("ab") as file, _bar(progress) as bar:
        task = bar.add_task(name, total=total, completed=have)
        while chunk := response.read1(_CHUNK):  # what is there already, so that a stall loses nothing
            have += len(chunk)
            if have > most:
                raise WeightsError(f"the server sends more than {most:,} bytes")
            file.write(chunk)
            bar.advance(task, len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise http.client.HTTPException(f"the transfer ended at {have:,} of {total:,} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            fp.close()
            raise WeightsError(f"it is redirected to {newurl:.100}, which is neither https nor as it was asked for")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(address: str, have: int) -> Any:
    """Ask for a file from byte `have` on. There are no handlers but those of http and https."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), _Redirects(),
        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    headers = {"User-Agent": "scconv_jax", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # it ends before `have`: another file
            return error
        raise


def _version(response: Any) -> str:
    """What tells one state of a file on the server from another."""
    return json.dumps([response.headers["ETag"], response.headers["Last-Modified"], _total(response)])


def _total(response: Any) -> int | None:
    """Bytes of the whole file, if the server says so."""
    found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", "")) if response.status == 206 else None
    length = found[1] if found else response.headers.get("Content-Length", "") if response.status == 200 else ""
    return int(length) if length.isdecimal() and len(length) < 20 else None


def _first(response: Any) -> int | None:
    """The first byte that a partial answer brings."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _version_path(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_path(part).unlink(missing_ok=True)


def _bar(progress: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not (progress and sys.stderr.isatty()), transient=True)


def _line(reason: object) -> str:
    """What a server or the system says, in one line that a terminal may be shown."""
    text = " ".join(str(reason).split())[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in text)
