"""README and docs: the Python blocks run, links and `make` targets exist, and facts stated twice agree."""

import ast
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from scconv_jax.interop.recognition import template

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes the files that the pages use: checkpoints of a network and of a layer, pictures, and exported digits."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)

    def random(shapes):
        return jax.tree.map(lambda leaf: generator.uniform(0.5, 1, leaf.shape).astype(np.float32), shapes)

    scconv_jax.save(folder / "scnet50-dc6a7e87.pth", random(template(scconv_jax.create_model("scnet50"))))
    layer = scconv_jax.ScConv(variant="2023-10")
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 16), np.float32))
    scconv_jax.save(folder / "scconv.pth", random(shapes))
    Image.fromarray(generator.integers(0, 255, (300, 400, 3), np.uint8)).save(folder / "photo.jpg")
    Image.fromarray(generator.integers(0, 255, (8, 8), np.uint8)).save(folder / "seven.png")
    (folder / "photos").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "photos")
    digits = scconv_jax.create_model("resnet20_small", num_classes=10)
    preparation = {"size": 32, "resize": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "exif": False}
    metadata = {
        "model": "resnet20_small",
        "arguments": {"num_classes": 10},
        "class_names": [str(digit) for digit in range(10)],
        "preparation": preparation,
    }
    scconv_jax.save(folder / "digits.safetensors", random(template(digits)), metadata)
    trained = scconv_jax.load_run(folder / "digits.safetensors")
    for name in ("digits.onnx", "digits.stablehlo", "digits"):
        scconv_jax.export(trained, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, files, monkeypatch):
    monkeypatch.chdir(files)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks or page.name != "README.md"
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|[`|;&] ?|ADDRESS )make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_the_site_lists_every_page():
    docs = ROOT / "docs"
    trees = re.findall(r"^```{toctree}\n(.*?)^```", (docs / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted([*listed, "index"]) == sorted(str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md"))


def test_the_page_of_errors_quotes_messages():
    """Each quotation in a first column occurs in the code, except for the parts that vary (…)."""
    constants = [
        node.value
        for package in ("scconv_jax", "train")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    rows = re.findall(r"^\| (?!of )(`.*?) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    quotations = [part.strip(" ,=") for row in rows for text in re.findall(r"`([^`]+)`", row) for part in text.split("…")]
    assert len(quotations) > 20
    for part in quotations:
        assert part in ("verify", "waiting_for_data") or any(part in constant for constant in constants), part


def test_the_figures_are_what_their_program_draws():
    drawings = runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))["FIGURES"]
    assert {path.stem for path in (ROOT / "docs" / "figures").glob("*.svg")} == set(drawings)
    for name, draw in drawings.items():
        assert (ROOT / "docs" / "figures" / f"{name}.svg").read_text() == draw().svg(), "run python docs/figures/draw.py"


def test_pre_commit_runs_the_ruff_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [pinned] = [need.removeprefix("ruff==") for need in extras["test"] if need.startswith("ruff==")]
    assert re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text()) == [pinned]


def test_the_citation_has_the_version_of_the_package():
    assert re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [scconv_jax.__version__]
