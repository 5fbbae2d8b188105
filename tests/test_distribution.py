"""The wheel holds the library alone and stays small; the sdist is a whole checkout, from which the same wheel is built."""

import email
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import scconv_jax

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "configs", "docs", "examples", "scconv_jax", "tests", "train")


def sources(package):
    """Returns the files of a folder, without caches and what `make docs` copies into it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not {"__pycache__", ".hypothesis", ".ipynb_checkpoints", "runtime"} & set(path.parts)
    }


def wheel(root, folder, monkeypatch):
    """Builds the wheel of a checkout and returns its path."""
    monkeypatch.chdir(root)  # hatchling reads the version and the licence relative to it
    [built] = WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"])
    return Path(built)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dist")


def test_the_wheel_holds_the_library_alone(folder, monkeypatch):
    built = wheel(ROOT, folder, monkeypatch)
    assert built.name == f"scconv_jax-{scconv_jax.__version__}-py3-none-any.whl"
    assert built.stat().st_size < 300_000
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{built.name[: -len('-py3-none-any.whl')]}.dist-info/METADATA"))
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == sources("scconv_jax")
    assert "scconv_jax/py.typed" in names
    assert {name.split(".dist-info/")[1] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "licenses/LICENSE-WordNet",
    }
    assert metadata["Version"] == scconv_jax.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    required = {need.split(">")[0] for need in metadata.get_all("Requires-Dist") if "extra ==" not in need}
    assert required == {"jax", "flax", "numpy", "safetensors", "ml-dtypes", "rich"}


def test_the_sdist_is_a_checkout_from_which_the_same_wheel_is_built(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    [built] = SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(built) as archive:
        # Python 3.11 has the filter from its fourth patch on; without it, 3.12 warns.
        archive.extractall(folder, **{"filter": "data"} if hasattr(tarfile, "data_filter") else {})
    unpacked = folder / Path(built).name.removesuffix(".tar.gz")
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    for package in PACKAGES:
        assert {name for name in found if name.startswith(f"{package}/")} == sources(package)
    for name in ("Makefile", "docs/conf.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", ".ci/run"):
        assert name in found
        assert os.access(unpacked / name, os.X_OK) == os.access(ROOT / name, os.X_OK), name
    again = folder / "again"
    again.mkdir()
    assert wheel(unpacked, again, monkeypatch).read_bytes() == wheel(ROOT, folder, monkeypatch).read_bytes()
    shutil.rmtree(unpacked)
