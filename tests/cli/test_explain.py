"""The command `explain` with two small networks of random weights, and every error as one line."""

import dataclasses
import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from scconv_jax.cli import explain, main
from scconv_jax.inference.run import TrainedModel

NAMES = ("zero", "one", "<b>two</b>", "three")


def make(name):
    model = scconv_jax.create_model(name, num_classes=4).clone(stage_sizes=(1, 1, 1))
    images = jnp.zeros((1, 13, 13, 3))
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.uniform(-0.2, 0.3, leaf.shape).astype(np.float32), shapes)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    return TrainedModel(model, variables, name, {}, NAMES, scconv_jax.images.Preparation(13, 13), ("a note",))


@pytest.fixture(scope="module")
def networks():
    return {name: make(name) for name in ("scnet20_small", "scconv_resnet20_small")}


@pytest.fixture(autouse=True)
def runs(networks, monkeypatch):
    """Opens these networks if --weights has their names, and other sources as usual."""
    extra = {
        "other_classes": dataclasses.replace(networks["scnet20_small"], class_names=("a", "b", "c", "d")),
        "more_classes": dataclasses.replace(networks["scnet20_small"], class_names=tuple("abcde")),
    }
    real = explain.open_run

    def open_run(source, *, checkpoint):
        known = networks | extra
        return known[source] if source in known else real(source, checkpoint=checkpoint)

    monkeypatch.setattr(explain, "open_run", open_run)


@pytest.fixture
def photos(tmp_path):
    paths = []
    for i, name in enumerate(("a.png", "<script>.jpg", "c.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (20 + i, 17, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


def test_pictures_and_page_of_two_networks(photos, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["explain", *photos, "--weights", "scnet20_small", "--beside", "scconv_resnet20_small", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "note: scnet20_small: a note" in printed.err
    assert "(3 images, " in printed.out
    assert {path.name for path in out.iterdir()} == {
        "explain.html", "grad_cam.png", "beside.png", "gates.png", "receptive_fields.png",
    }  # fmt: skip
    assert "<script>.jpg" not in (out / "explain.html").read_text()
    # One more batch of the same size compiles nothing, and a single page is written where it is asked for.
    page = tmp_path / "page.html"
    chosen = [*photos, "--weights", "scnet20_small", "--class", "<b>two</b>", "--class", "3", "--needs", "gates"]
    assert main(["explain", *chosen, "--out", str(page)]) == 0
    assert page.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weights", "scnet20_small", "--class", "thre"],
            "--class thre: scnet20_small has no such class. Did you mean 'three'",
        ),
        (["--weights", "scnet20_small", "--class", "4"], "--class 4: scnet20_small has no such class. Its classes: zero, one,"),
        (
            ["--weights", "scnet20_small", "--needs", "cru"],
            "scnet20_small has no CRU. These networks have one: scconv_densenet121",
        ),
        (["--weights", "scnet20_small", "--needs", "sru"], "scnet20_small has no SRU. These networks have one: "),
        (
            ["--weights", "scconv_resnet20_small", "--needs", "gates"],
            "scconv_resnet20_small has no self-calibrated convolution. These networks have one: scnet101, ",
        ),
        (
            ["--weights", "scnet20_small", "--beside", "other_classes"],
            "--beside: class 0 is 'a' for scnet20_small and 'zero' for ",
        ),
        (["--weights", "missing_file.pth"], "missing_file.pth"),
    ],
)
def test_errors_of_weights_and_classes(photos, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["explain", *photos, *arguments, "--out", str(out)]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert all(note.startswith("note: ") for note in notes)
    assert not out.exists()


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_errors_of_images_and_places(photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "folder").mkdir()
    cases = [
        ([photos[0], str(tmp_path / "bad.png")], "out", "bad.png cannot be read: not an image"),
        ([str(tmp_path / "absent.png")], "out", f"There is no file or folder {tmp_path}/absent.png."),
        ([str(tmp_path / "folder")], "out", "holds no image files"),
        (photos, "out", "3 images are too many for one page; give at most 2."),
        ([photos[0]], "a.png", "a.png is a file; name a folder, or a page that ends in .html."),
        ([photos[0]], "none/page.html", f"There is no folder {tmp_path}/none to write page.html in; make it first."),
        ([photos[0]], "gs://bucket", "is an address"),
        ([photos[0]], "new.png", "new.png: name a folder, or a page that ends in .html; nothing else is written."),
        ([photos[0]], "a.png/page", f"There is no folder {tmp_path}/a.png to write explain.html in; make it first."),
        ([photos[0]], "full", "full: No space left on device."),
    ]
    monkeypatch.setattr(explain, "write", full_disk)
    monkeypatch.setattr(explain, "LIMIT", 2)
    before = sorted(tmp_path.rglob("*"))
    for images, out, message in cases:
        place = out if "://" in out else str(tmp_path / out)
        assert main(["explain", *images, "--weights", "scnet20_small", "--out", place]) == 2
        *notes, error = capsys.readouterr().err.splitlines()
        assert message in error
        assert set(notes) <= {"note: scnet20_small: a note"}
        assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite(networks, photos):
    trained = networks["scnet20_small"]
    broken = dataclasses.replace(trained, variables=jax.tree.map(lambda leaf: leaf * np.nan, trained.variables))
    with pytest.raises(ValueError, match="The logits of scnet20_small are not finite"):
        scconv_jax.explanation.explain(broken, photos)


def test_more_images_than_a_batch_give_what_single_batches_give(networks, photos, monkeypatch):
    from scconv_jax.explanation import explained

    trained = networks["scnet20_small"]
    images = [*photos, *photos[:2]]
    monkeypatch.setattr(explained, "BATCH", 3)  # two batches of three, the last filled up
    many = scconv_jax.explanation.explain(trained, images)
    single = scconv_jax.explanation.explain(trained, photos)
    assert many.classes.shape == (5, 3)
    np.testing.assert_array_equal(many.classes[:3], single.classes)
    for stage, cam in single.cams.items():
        np.testing.assert_allclose(many.cams[stage][:3], cam, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(many.cams[stage][3:], cam[:2], rtol=1e-5, atol=1e-7)
    assert list(many.gates) == ["layer1/0/scconv", "layer2/0/scconv", "layer3/0/scconv"]
    np.testing.assert_allclose(single.probabilities.sum(1), 1, rtol=1e-5)
