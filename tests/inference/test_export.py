"""`export` and its command: every file is opened by the program that runs it, and gives the network's logits."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax import functional as F
from scconv_jax.cli import main
from scconv_jax.images import Preparation
from scconv_jax.inference import export as export_module
from scconv_jax.inference import export_check, hub_folder
from scconv_jax.inference.export import PLATFORMS
from scconv_jax.weights import safetensors_files
from tests.inference.test_onnx import random_variables

NAMES = (
    "caf\udce9",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "a | b `c`",
)  # the first is the name of a folder that is not UTF-8
PREPARATION = Preparation(size=32, resize=35, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights with class names, as `convert` writes it from a run."""
    model = scconv_jax.create_model("scnet20_small", num_classes=4)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    metadata = {
        "model": "scnet20_small",
        "arguments": {"num_classes": 4},
        "class_names": NAMES,
        "preparation": dataclasses.asdict(PREPARATION),
    }
    scconv_jax.save(path, random_variables(model, (1, 32, 32, 3)), metadata)
    return path


@pytest.fixture(scope="module")
def logits(weights):
    model, variables = scconv_jax.load_model(weights)
    return jax.jit(lambda images: model.apply(jax.tree.map(jnp.asarray, variables), images, train=False))


def pictures(*shape):
    return RNG.standard_normal((*shape, 3), np.float32)


def equal(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_onnx(weights, logits, tmp_path, capsys):
    out = tmp_path / "digits.onnx"
    assert main(["export", "--weights", str(weights), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "onnx, opset 18" in printed
    assert "images, float32 (n, 32, 32, 3)" in printed
    assert "logits, float32 (n, 4)" in printed
    assert "of the largest logit, on random images (3, 32, 32, 3)" in printed
    assert not any("bn1_a" in node.name for node in onnx.load(out).graph.node)  # fused
    session = onnxruntime.InferenceSession(out)
    for images in (pictures(1, 32, 32), pictures(5, 32, 32)):
        equal(session.run(["logits"], {"images": images})[0], logits(images))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(NAMES)
    assert Preparation(**{key: _tuple(value) for key, value in json.loads(about["preparation"]).items()}) == PREPARATION
    assert about["model"] == "scnet20_small"
    assert [path.name for path in tmp_path.iterdir()] == ["digits.onnx"]


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def test_onnx_with_channels_first_open_sizes_and_a_fixed_batch(weights, logits, tmp_path):
    exported = scconv_jax.export(weights, tmp_path / "a.onnx", batch=2, size="dynamic", channels_first=True, fuse=False)
    assert any("bn1_a" in node.name for node in onnx.load(exported.path).graph.node)
    assert exported.images == (2, 3, "4*h", "4*w")
    session = onnxruntime.InferenceSession(exported.path)
    images = pictures(2, 36, 64)
    equal(session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})[0], logits(images))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(["logits"], {"images": pictures(3, 36, 64).transpose(0, 3, 1, 2)})


PROGRAM = """
import sys, jax, json, numpy as np
from pathlib import Path
file = Path(sys.argv[1])
program = jax.export.deserialize(bytearray(file.read_bytes()))
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.asarray(program.call(images)))
assert "scconv_jax" not in sys.modules and "flax" not in sys.modules
print(json.dumps([program.platforms, str(program.in_avals[0].shape)]))
"""


def test_stablehlo_in_another_process(weights, logits, tmp_path):
    """JAX alone runs it: neither this library nor Flax is loaded."""
    out, images = tmp_path / "digits.stablehlo", pictures(3, 64, 40)
    assert main(["export", "--weights", str(weights), "--out", str(out), "--size", "dynamic"]) == 0
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", f"import jax.export{PROGRAM}", out, tmp_path / "images.npy", tmp_path / "logits.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["cpu", "cuda", "tpu"], "(n, 4*h, 4*w, 3)"]
    equal(np.load(tmp_path / "logits.npy"), logits(images))
    about = json.loads((tmp_path / "digits.stablehlo.json").read_text())
    assert about["class_names"] == list(NAMES)
    assert about["images"] == ["n", "4*h", "4*w", 3]
    assert about["platforms"] == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize(
    ("platforms", "forms"),
    [(("cpu",), {"dot_general"}), (("cuda",), {"convolution"}), (PLATFORMS, {"dot_general", "convolution"})],
)
def test_a_program_has_the_form_of_each_platform(platforms, forms):
    """A 1×1 convolution is a matmul on CPU only."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    data = export_module._stablehlo(lambda x: F.conv(x, jnp.ones((1, 1, 4, 4))), images, platforms)
    program = jax.export.deserialize(bytearray(data))
    assert program.platforms == platforms
    assert {form for form in ("dot_general", "convolution") if f"stablehlo.{form}" in program.mlir_module()} == forms


def test_a_folder_of_the_hub(weights, tmp_path, capsys):
    folder = tmp_path / "my model"
    assert main(["export", "--weights", str(weights), "--out", str(folder), "--format", "hub"]) == 0
    assert "weights, class names and preparation are equal" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub_folder.FILES)
    trained, (model, variables) = scconv_jax.load_run(folder), scconv_jax.load_model(folder)
    assert trained.class_names == NAMES
    assert trained.preparation == PREPARATION
    assert model == trained.model == scconv_jax.create_model("scnet20_small", num_classes=4)
    jax.tree.map(np.testing.assert_array_equal, variables, scconv_jax.load(weights).variables)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(label): name for label, name in enumerate(NAMES)}
    assert config["architecture"] == "scnet20_small"
    card = (folder / "README.md").read_text()
    assert '    0: "caf?"' in card
    assert f"| parameters | {sum(leaf.size for leaf in jax.tree.leaves(variables['params'])):,} |" in card
    assert "| multiply-adds | " in card
    assert "not recorded: data, test accuracy (top-1), checkpoint, epochs of the run, date of the checkpoint" in card
    assert '    1: "<script>alert(1)</script>"' in card.splitlines()  # indented: code, in Markdown
    assert "model-index" not in card


def test_the_card_of_a_run_has_what_was_measured(weights, tmp_path):
    """A run's folder says step, data and accuracy; its text cannot leave its place in the card."""
    run = tmp_path / "run"
    for step, top1 in ((10, 0.5), (20, 0.97531)):
        (run / "checkpoints" / str(step) / "metrics").mkdir(parents=True)
        (run / "checkpoints" / str(step) / "metrics" / "metrics").write_text(json.dumps({"eval/top1": top1}))
        os.utime(run / "checkpoints" / str(step), (1.7e9, 1.7e9))
    (run / "config.json").write_text(json.dumps({"epochs": 3, "data": {"name": "digits`|<b>\n---"}}))
    record = hub_folder.read_record(run, "best")
    assert record == hub_folder.RunRecord("run", "digits`|<b>\n---", 20, 3, 0.97531, "2023-11-14")
    assert hub_folder.read_record(run, "10").top1 == 0.5
    hub_folder.write(tmp_path / "hub", scconv_jax.load_run(weights), record)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| test accuracy (top-1) | 97.53% |\n| checkpoint | step 20 |\n| epochs of the run | 3 |" in card
    assert "| data | `digits<b>---` |" in card
    assert card.count("\n---\n") == 1
    index = json.loads(next(line for line in card.splitlines() if line.startswith("model-index")).partition(": ")[2])
    assert index[0]["results"][0]["metrics"][0]["value"] == 97.53
    assert "assumed" not in card


def test_the_card_says_what_is_assumed(weights):
    notes = ("It does not say how its images are prepared: ImageNet's mean is assumed.", "ImageNet's 1,000 classes are assumed.")
    trained = dataclasses.replace(scconv_jax.load_run(weights), notes=notes)
    card = hub_folder._card("hub", trained, hub_folder.RunRecord())
    assert "`load_run` does this. This is not recorded but assumed.\n" in card
    assert "## Classes\n\nThese names are not recorded but assumed.\n\n    0: " in card


def test_a_folder_that_exists_is_replaced_only_if_asked(weights, tmp_path, capsys):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert main(["export", "--weights", str(weights), "--out", str(folder), "--format", "hub"]) == 2
    assert "hub exists. Give another name, or replace it with force (--force)." in capsys.readouterr().err
    scconv_jax.export(weights, folder, "hub", force=True)
    assert {path.name for path in folder.iterdir()} == {*hub_folder.FILES, "notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.onnx", "--size", "8", "8"], "scnet20_small needs images of at least 13×13 px; got 8×8."),
        (["--out", "a.onnx", "--size", "1", "2", "3"], "--size 1 2 3: expected height and width, such as 224 224, or dynamic."),
        (["--out", "a.onnx", "--size", "big"], "--size big: expected a positive number, or dynamic."),
        (["--out", "a.onnx", "--batch", "0"], "--batch 0: expected a positive number, or dynamic."),
        (["--out", "a.tflite"], "a.tflite does not tell the format. End it in .onnx or .stablehlo, or give a format: onnx,"),
        (["--out", "a.stablehlo", "--channels-first"], "Only ONNX files can take channels first, and the format is stablehlo."),
        (
            ["--out", "a.stablehlo", "--platforms", "tpu"],
            "before success is said: name cpu among the platforms",
        ),
        (["--out", "a.onnx", "--tolerance", "-1"], "tolerance=-1 must be above 0."),
        (["--out", "missing/a.onnx"], "There is no folder missing to write a.onnx in; make it first."),
        (["--out", "missing/a", "--format", "hub"], "There is no folder missing to write a in; make it first."),
        (["--out", "a.onnx", "--checkpoint", "20"], "checkpoint"),
        (["--out", "a.onnx", "--weights", "nothing.pth"], "nothing.pth"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(weights, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--weights", str(weights), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("scconv-jax: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "package"), [("a.onnx", "onnxruntime"), ("a.stablehlo", "flatbuffers")])
def test_a_missing_package_is_named_before_the_work(weights, tmp_path, monkeypatch, capsys, name, package):
    find = export_module.importlib.util.find_spec
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    assert main(["export", "--weights", str(weights), "--out", str(tmp_path / name)]) == 2
    assert f"needs the package {package}: pip install 'scconv-jax[export]'" in capsys.readouterr().err


def test_a_file_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    """The exported function adds a little to the logits, and the saved weights are others."""

    def other(write):
        return lambda apply, *arguments, **options: write(
            lambda x: apply(x) + 1e-3 * jnp.arange(4.0)[None], *arguments, **options
        )

    for writer in ("to_onnx", "_stablehlo"):
        monkeypatch.setattr(export_module, writer, other(getattr(export_module, writer)))
    save = hub_folder.save
    monkeypatch.setattr(hub_folder, "save", lambda path, tree, about: save(path, jax.tree.map(np.negative, tree), about))
    for name, form in (("a.onnx", None), ("a.stablehlo", None), ("a", "hub")):
        with pytest.raises(scconv_jax.ExportError, match=r"Nothing was written\."):
            scconv_jax.export(weights, tmp_path / name, form)
        assert not list(tmp_path.iterdir())


def test_what_exists_stays_after_an_error(weights, tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"before")

    def differs(*_):
        raise scconv_jax.ExportError("differs")

    monkeypatch.setattr(export_module, "compare", differs)
    with pytest.raises(scconv_jax.ExportError, match="differs"):
        scconv_jax.export(weights, path, force=True)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


class Gate(nn.Module):
    """A spatial reconstruction unit as a network."""

    threshold: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train):
        return scconv_jax.SRU(threshold=self.threshold, groups=1)(x, train=train).reshape(len(x), -1)


def test_a_difference_is_accepted_only_if_a_gate_lies_at_its_threshold():
    sizes = export_check.ImageSizes(2, (4, 4), 4, 1, 1)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)  # the images that are compared
    normal = (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)
    weight = float(np.quantile(1 / (1 + np.exp(-normal / 4)), 0.7, method="nearest"))
    variables = Gate(weight).init(jax.random.key(0), jnp.asarray(x), train=False)

    def found(threshold, factor):
        apply = jax.jit(partial(Gate(threshold).apply, train=False))
        return lambda images: factor * np.asarray(apply(variables, images))

    compared = export_check.compare(found(weight - 5e-6, 1), Gate(weight + 5e-6), variables, sizes, 1e-5)
    assert compared.difference > 1e-2
    assert compared.rounding > compared.difference / 4
    with pytest.raises(scconv_jax.ExportError, match=r"differs from the network by .* on images \(2, 4, 4, 4\)"):
        export_check.compare(found(0.9, 1.001), Gate(0.9), variables, sizes, 1e-5)


def test_metadata_is_what_the_format_can_hold(weights, tmp_path):
    scconv_jax.export(weights, tmp_path / "hub", "hub")
    metadata = safetensors_files.read(tmp_path / "hub" / "model.safetensors").metadata
    assert all(isinstance(value, str) for value in metadata.values())
    scconv_jax.export(scconv_jax.load_run(weights), tmp_path / "b.onnx", size=(16, 24), batch=1)
    model = onnx.load(tmp_path / "b.onnx")
    assert [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim] == [1, 16, 24, 3]
