"""Paths as users give them, and the cache folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scconv_jax import files


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder of one's own, and no other setting."""
    for name in ("SCCONV_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(files, "_temporary_cache", files._temporary_cache.__wrapped__)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b", "a/b"),
        ("~", "HOME"),
        ("~/x", "HOME/x"),
        (Path("~/x"), "HOME/x"),
        ("./gs:/x", "gs:/x"),
        ("c:/x", "c:/x"),
        ("a:b", "a:b"),
    ],
)
def test_a_path_as_given(home, name, path):
    assert files.local_path(name) == Path(path.replace("HOME", str(home)))


@pytest.mark.parametrize(
    "name",
    [
        "gs://bucket/run",
        Path("gs://bucket/run"),
        "s3://bucket",
        "hdfs://x/y",
        "file:///tmp/x",
        "https://x.org/a",
        "abfss://a@b/c",
    ],
)
def test_an_address_is_no_path(name):
    with pytest.raises(ValueError, match=r"^\w+://.* is an address, not a folder of this machine: mount what it names"):
        files.local_path(name)


def test_the_home_of_nobody():
    with pytest.raises(ValueError, match=r"^~no-such-user/x: no home folder is known for ~no-such-user; give the path in full$"):
        files.local_path("~no-such-user/x")


def test_the_cache_is_in_the_home_folder_or_where_the_user_wants_it(home, tmp_path, monkeypatch):
    assert files.cache_folder() == home / ".cache" / "scconv_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "scconv_jax"
    monkeypatch.setenv("SCCONV_JAX_CACHE", "~/mine")
    assert files.cache_folder() == home / "mine"


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("HOME", "/dev/null", "~/.cache/scconv_jax: Not a directory)"),
        ("XDG_CACHE_HOME", "/proc/x", "/proc/x/scconv_jax: No such file or directory)"),
        ("SCCONV_JAX_CACHE", "gs://bucket/x", "gs://bucket/x is an address, not a folder of this machine"),
        ("SCCONV_JAX_CACHE", "~no-such-user", "~no-such-user: no home folder is known"),
    ],
)
def test_without_a_cache_folder_there_is_a_temporary_one_and_a_line(monkeypatch, caplog, setting, value, reason):
    monkeypatch.setenv(setting, value)
    folder = files.cache_folder()
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700, "nobody else may put weights there"
    (record,) = caplog.records
    assert record.getMessage().startswith(f"There is no cache folder ({reason}")
    assert record.getMessage().endswith("until this process ends. Set SCCONV_JAX_CACHE to a folder for them.")


def test_a_process_without_a_home_says_so_once_and_leaves_nothing(tmp_path):
    """As in a container: `docker run --user 12345`. Neither HOME nor an entry for the user."""
    program = (
        "import importlib.util, os, sys\n"
        "specification = importlib.util.spec_from_file_location('files', sys.argv[1])\n"
        "files = importlib.util.module_from_spec(specification)\n"
        "specification.loader.exec_module(files)\n"
        "os.path.expanduser = lambda path: path\n"
        "assert files.cache_folder() == files.cache_folder() and files.cache_folder().is_dir()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program, files.__file__], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "There is no cache folder (~/.cache/scconv_jax: no home folder is known for ~" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "the temporary folder is gone"


def test_where_nothing_can_be_written_the_use_fails_not_the_look(monkeypatch, caplog):
    def full(**_):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("SCCONV_JAX_CACHE", "/dev/null/x")
    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    assert files.cache_folder() == Path("/dev/null/x")
    assert len(caplog.records) == 1
