"""Every example runs in its small form, learns what it shows, and imports public names only."""

import ast
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import scconv_jax

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NEEDS = {"jax", "flax", "numpy", "optax", "sklearn"}
NEEDS_OF = {"equinox_functional": {"equinox"}, "first_steps": {"matplotlib"}}


def example(name):
    """Returns the names that an example defines. Its `main` is not called."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def small(name, *arguments):
    """Runs the small form of an example and returns what it measured."""
    return example(name)["main"](["--small", *arguments])


def test_feature_pyramid_finds_squares_on_both_levels():
    found = small("feature_pyramid")
    assert found["strides"] == [8, 16, 32]
    before, after = found["found"]
    assert before < 0.3
    assert after > 0.6


@pytest.mark.parametrize(("output_stride", "strides"), [(32, (8, 16, 32)), (16, (8, 16, 16)), (8, (8, 8, 8))])
def test_feature_pyramid_fits_every_output_stride(output_stride, strides):
    backbone = scconv_jax.create_model("scnet50", output_stride=output_stride)
    info = scconv_jax.feature_info(backbone)
    maps = {
        level: jax.ShapeDtypeStruct((2, 128 // info[level].stride, 128 // info[level].stride, info[level].channels), jnp.float32)
        for level in ("layer2", "layer3", "layer4")
    }
    outputs, _ = jax.eval_shape(
        lambda key, maps: example("feature_pyramid")["Pyramid"](16).init_with_output(key, maps), jax.random.key(0), maps
    )
    assert [output.shape for output in outputs] == [(2, 128 // stride, 128 // stride, 16) for stride in strides]


def test_segmentation_tells_discs_from_squares():
    found = small("segmentation")
    assert found["stride"] == 8
    before, after = found["iou"]
    assert before < 0.35
    assert after > before + 0.15


def test_keypoints_are_found_on_unseen_digits():
    found = small("keypoints")
    assert found["loss"][1] < 0.7 * found["loss"][0]
    before, after = found["pck"]
    assert before < 0.2
    assert after > 0.5


def test_unet_removes_noise_from_unseen_digits():
    found = small("unet_nnx")
    noisy, restored = found["error"]
    assert restored < 0.5 * noisy


def test_equinox_network_reads_unseen_digits():
    pytest.importorskip("equinox")
    before, after = small("equinox_functional")["accuracy"]
    assert before < 0.3
    assert after > 0.8


def test_fine_tuning_changes_only_what_is_not_frozen():
    found = small("fine_tuning")
    before, after = found["accuracy"]
    assert before < 0.5
    assert after > 0.8
    for collection in ("params", "batch_stats"):
        for module, same in found["unchanged"][collection].items():
            unchanged = set(jax.tree.leaves(same))
            assert unchanged == ({True} if module in ("conv1", "bn1", "layer1") else {False}), (collection, module)


def test_distillation_teaches_a_smaller_network_without_labels():
    found = small("distillation")
    assert found["parameters"]["student"] < 0.5 * found["parameters"]["teacher"]
    assert found["accuracy"]["teacher"] > 0.8
    assert found["accuracy"]["student"] > 0.8
    assert all(jax.tree.leaves(found["converted"]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_what_is_stored(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    stored = nbformat.read(path, 4)
    executed = nbclient.NotebookClient(nbformat.read(path, 4), timeout=600).execute()
    for before, after in zip(stored.cells, executed.cells, strict=True):
        if before.cell_type == "code":
            assert printed(after) == printed(before), before.source
            assert pictures(after) == pictures(before), before.source


def printed(cell):
    """Returns what a cell printed, without percentages, which depend on the machine's rounding."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
    return re.sub(r"\d+%", "N%", text)


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_small_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 60_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"])
    assert "/root" not in path.read_text()
    assert "/home" not in path.read_text()


def sources(path):
    """Returns the Python source of an example or a notebook."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", EXAMPLES + NOTEBOOKS, ids=lambda path: path.stem)
def test_examples_import_public_names_only(path):
    public = {"scconv_jax": set(scconv_jax.__all__)}
    public |= {f"scconv_jax.{name}": set(getattr(scconv_jax, name).__all__) for name in ("functional", "layers", "models")}
    tree = ast.parse(sources(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("scconv_jax."), alias.name
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("scconv_jax"):
            assert {alias.name for alias in node.names} <= public[node.module]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "scconv_jax":
            assert node.attr in public["scconv_jax"], f"line {node.lineno}: scconv_jax.{node.attr} is not public"
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    standard = {"argparse", "functools", "pathlib", "tempfile"}
    assert {name.split(".")[0] for name in modules} <= {"scconv_jax"} | NEEDS | NEEDS_OF.get(path.stem, set()) | standard


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_headers_say_command_time_and_result(path):
    text = path.read_text()
    header = ast.get_docstring(ast.parse(text))
    assert re.search(rf"^Command    python examples/{path.name} \[--small\]", header, re.MULTILINE)
    assert re.search(r"^Time       .+", header, re.MULTILINE)
    assert re.search(r"^Result     .+", header, re.MULTILINE)
    assert 60 <= len(text.splitlines()) <= 150


def test_the_page_lists_every_example():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert {*re.findall(r"\]\(\.\./examples/([\w.]+)\)", page)} == {path.name for path in EXAMPLES + NOTEBOOKS}
