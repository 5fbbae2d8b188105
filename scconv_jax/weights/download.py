"""Downloads weights by name or address into a cache, once, completely and with the right hash or not at all."""

from __future__ import annotations

import contextlib
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

from scconv_jax.files import cache_folder
from scconv_jax.messages import did_you_mean, printable
from scconv_jax.weights.files import WeightsError, sha256

TIMEOUT = 30.0
"""A download fails after this many seconds without a byte."""

MAX_BYTES = 16 << 30

_CHUNK = 1 << 20


def fetch(
    source: str,
    *,
    published: Mapping[str, str] = MappingProxyType({}),
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Download weights unless they are in the cache.

    An interrupted download is kept. The next call continues it if the server still has the same file. If two
    processes fetch the same file, one waits for the other (except on Windows, which lacks `fcntl`).

    Args:
        source: A name in `published`, or an http or https address.
        published: Addresses of published files by name.
        cache: Folder for the files. If None, `SCCONV_JAX_CACHE`, else `scconv_jax` in the user's cache folder
            (`XDG_CACHE_HOME`, else `~/.cache`).
        progress: Show a progress bar if standard error is a terminal.

    Returns:
        The file on this machine. If its name ends in eight hex digits (`scnet50-dc6a7e87.pth`), its SHA-256 begins with them.
        Other files in the cache are not compared with the server's again.
    """
    address = published.get(source, source)
    path = _cache_path(address, Path(cache) if cache is not None else cache_folder(), published)
    shown = address.partition("?")[0]  # the query may be a secret key
    expected = _hash_in_name(path.name)
    try:
        if _is_complete(path, expected):  # perhaps in a cache that this user cannot write
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if not _is_complete(path, expected):
                part = path.with_name(path.name + ".part")
                _download(address, part, path.name, progress)
                if expected and (found := sha256(part)[:8]) != expected:
                    _delete_part(part)
                    raise WeightsError(f"SHA-256 mismatch: expected {expected}…, got {found}…; the download was deleted")
                part.replace(path)
                _delete_part(part)
    except WeightsError as error:
        raise WeightsError(f"{shown} cannot be downloaded: {error}.") from error
    except urllib.error.HTTPError as error:
        error.close()
        raise WeightsError(f"{shown} cannot be downloaded: the server says {error.code} {_one_line(error.reason)}.") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = _one_line(getattr(error, "reason", None) or error or type(error).__name__)
        raise WeightsError(
            f"{shown} cannot be downloaded: {reason}. Try again (the part that has arrived is kept), "
            f"or put the file into {path.parent} by hand."
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{shown} cannot be stored in {path.parent}: {error.strerror or error}. SCCONV_JAX_CACHE sets another folder."
        ) from error
    return path


def _cache_path(address: str, cache: Path, published: Mapping[str, str]) -> Path:
    """Return the path in the cache for the file at an address."""
    try:
        parts = urllib.parse.urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and address.isascii() and not re.search(r"\s", address)
    except ValueError:
        parts, valid = urllib.parse.SplitResult("", "", "", "", ""), False
    if not valid:
        raise WeightsError(
            f"{address!r:.200} is neither a published checkpoint ({', '.join(published)}) nor an http or https address, "
            f"and there is no such file or folder.{did_you_mean(address, published, most=1, cutoff=0.6)}"
        )
    name = urllib.parse.unquote(parts.path.rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", name).lstrip(".")[-120:] or "weights"
    if _hash_in_name(name):
        return cache / name
    return cache / hashlib.sha256(address.encode()).hexdigest()[:12] / name  # many servers have a file called model.pth


def _is_complete(path: Path, expected: str) -> bool:
    return path.exists() and (not expected or sha256(path)[:8] == expected)


def _hash_in_name(name: str) -> str:
    found = re.search(r"-([0-9a-f]{8})$", name.partition(".")[0])
    return found[1] if found else ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process fetches the same file."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(address: str, part: Path, name: str, progress: bool) -> None:
    """Complete the partial file: continue it if the server still has the same version, else start again."""
    version_path = _version_path(part)
    part_version = version_path.read_text() if part.exists() and version_path.exists() else ""
    have = part.stat().st_size if part_version else 0
    with _request(address, have) as response:
        version, total = _version(response), _total_bytes(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise WeightsError("the server sends it compressed, which was not requested")
        if response.status == 206 and have and version == part_version and _first_byte(response) == have:
            return _receive(response, part, have, total, name, progress)
        if response.status == 200:
            _delete_part(part)
            # Without these headers, only a hash in the name could show that the rest belongs to the same file.
            if response.headers["ETag"] or response.headers["Last-Modified"] or _hash_in_name(name):
                version_path.write_text(version)
            return _receive(response, part, 0, total, name, progress)
        if not have:
            raise WeightsError(f"the server answers {response.status} {_one_line(response.reason)}")
    _delete_part(part)
    return _download(address, part, name, progress)


def _receive(response: Any, part: Path, have: int, total: int | None, name: str, progress: bool) -> None:
    if total is None and not _hash_in_name(name):
        raise WeightsError("the server does not say how long it is, so an incomplete file could not be recognised")
    limit = MAX_BYTES if total is None else total
    if limit > MAX_BYTES:
        raise WeightsError(f"it has {total:,} bytes; the limit is {MAX_BYTES:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    hidden = not (progress and sys.stderr is not None and sys.stderr.isatty())
    bar = Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True)
    with part.open("ab") as file, bar:
        task = bar.add_task(name, total=total, completed=have)
        while chunk := response.read1(_CHUNK):  # returns what has arrived, so that a stall loses nothing
            have += len(chunk)
            if have > limit:
                raise WeightsError(f"the server sends more than {limit:,} bytes")
            file.write(chunk)
            bar.advance(task, len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise http.client.HTTPException(f"the download ended at {have:,} of {total:,} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            fp.close()
            raise WeightsError(f"it is redirected to {newurl:.100}, which is neither https nor the requested scheme")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _request(address: str, start: int) -> Any:
    """Request a file from byte `start` on. Only http and https have handlers."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), _Redirects(),
        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    headers = {"User-Agent": "scconv_jax", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # the server's file ends before `start`, so it is another one
            return error
        raise


def _version(response: Any) -> str:
    """Return an identifier for the server's version of a file."""
    return json.dumps([response.headers["ETag"], response.headers["Last-Modified"], _total_bytes(response)])


def _total_bytes(response: Any) -> int | None:
    """Return the size of the whole file, or None if the server does not say."""
    found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", "")) if response.status == 206 else None
    length = found[1] if found else response.headers.get("Content-Length", "") if response.status == 200 else ""
    return int(length) if length.isdecimal() and len(length) < 20 else None


def _first_byte(response: Any) -> int | None:
    """Return the position in the file at which a partial response begins."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _version_path(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _delete_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_path(part).unlink(missing_ok=True)


def _one_line(reason: object) -> str:
    """Return a reason from a server or the system as one printable line."""
    return printable(" ".join(str(reason).split())[:200])
