"""`scconv_jax.predict` and the command `predict`: files, folders, arrays, and images that cannot be read."""

import csv
import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from scconv_jax.cli import main
from scconv_jax.cli.predict import _line
from scconv_jax.images import SUFFIXES
from scconv_jax.inference import predict as predictions
from scconv_jax.inference.predict import Prediction, list_images, predict_each
from scconv_jax.inference.run import Answer
from tests.image_files import encoded, photo
from train.data import index


@pytest.fixture(scope="module")
def trained(run):
    return scconv_jax.load_run(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images in two folders, of which two cannot be read, and other files."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    (folder / ".hidden").mkdir()
    for number, path in enumerate(("c.jpg", "a.JPG", "b/d.png", ".hidden/e.jpg", ".f.jpg", "b/g.jpeg", "z.jpg")):
        kind = "PNG" if path.endswith("png") else "JPEG"
        (folder / path).write_bytes(encoded(photo(40 + number, 50, seed=number), kind))
    (folder / "b" / "page.jpg").write_text("<html>404</html>")
    (folder / "half.jpg").write_bytes((folder / "c.jpg").read_bytes()[:600])
    (folder / "notes.txt").write_text("no image")
    return folder


READABLE = ["a.JPG", "b/d.png", "b/g.jpeg", "c.jpg", "z.jpg"]


def names(predictions, folder):
    return [os.path.relpath(prediction.image, folder) for prediction in predictions]


def expected(trained, paths):
    """Probabilities of each image, computed alone and not compiled together with its preparation."""
    logits = trained.model.apply(trained.variables, jnp.asarray(trained.prepare(paths)), train=False)
    shares = np.exp(np.asarray(logits) - np.max(logits, axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def test_a_folder_is_predicted_in_the_order_of_its_paths(trained, folder):
    found = scconv_jax.predict(folder, trained, top=3, batch_size=2)
    assert names(found, folder) == ["a.JPG", "b/d.png", "b/g.jpeg", "b/page.jpg", "c.jpg", "half.jpg", "z.jpg"]
    failed = {os.path.relpath(row.image, folder): row.error for row in found if row.error}
    assert failed.keys() == {"b/page.jpg", "half.jpg"}
    assert failed["b/page.jpg"] == "not an image"
    assert "truncated" in failed["half.jpg"].lower()
    good = [row for row in found if not row.error]
    shares = expected(trained, [folder / name for name in READABLE])
    for row, share in zip(good, shares, strict=True):
        assert [answer.label for answer in row.answers] == np.argsort(-share).tolist()
        # 1e-4: the probabilities are rounded differently in another program.
        np.testing.assert_allclose([answer.probability for answer in row.answers], np.sort(share)[::-1], rtol=1e-4)
        assert [answer.name for answer in row.answers] == [trained.readable_names[answer.label] for answer in row.answers]
    assert all(row.answers == () for row in found if row.error)


def test_the_size_of_a_batch_changes_nothing_but_rounding(trained, folder):
    whole, ones = (scconv_jax.predict(folder, trained, batch_size=size) for size in (100, 1))
    assert [row.image for row in whole] == [row.image for row in ones]
    for row, other in zip(whole, ones, strict=True):
        assert [answer.label for answer in row.answers] == [answer.label for answer in other.answers]
        np.testing.assert_allclose(
            [answer.probability for answer in row.answers], [answer.probability for answer in other.answers], rtol=1e-4
        )


def test_one_shape_is_compiled(run, folder):
    trained = scconv_jax.load_run(run)
    assert len(scconv_jax.predict(folder, trained, batch_size=2)) == 7
    assert trained._compiled._cache_size() == 1


def test_arrays_and_pil_images(trained):
    arrays = np.stack([photo(33, 34, seed) for seed in range(3)])
    found = scconv_jax.predict([Image.fromarray(array) for array in arrays], trained, top=1)
    assert [row.image for row in found] == ["images[0]", "images[1]", "images[2]"]
    assert [row.answers[0].label for row in found] == [answers[0].label for answers in trained.predict(arrays, top=1)]
    [single] = trained.predict(arrays[0], top=1)
    assert single[0].label == found[0].answers[0].label
    with pytest.raises(TypeError, match="array of float32"):
        scconv_jax.predict(arrays.astype(np.float32), trained)


@pytest.mark.parametrize(("name", "value"), [("top", 0), ("top", 1.5), ("batch_size", 0), ("batch_size", True)])
def test_numbers_out_of_range(trained, folder, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be an integer of 1 or more"):
        scconv_jax.predict(folder, trained, **{name: value})


def test_paths_that_name_no_image(trained, tmp_path):
    with pytest.raises(ValueError, match=r"The folder .* holds no image files"):
        scconv_jax.predict(tmp_path, trained)
    with pytest.raises(ValueError, match=r"There is no file or folder .*x\.jpg\."):
        scconv_jax.predict(tmp_path / "x.jpg", trained)
    with pytest.raises(ValueError, match="There is no image"):
        scconv_jax.predict([], trained)
    with pytest.raises(ValueError, match="nothing to predict"):
        trained.predict([])
    with pytest.raises(scconv_jax.images.ImageError, match="cannot be read: not an image"):
        trained.predict(b"x")


def test_images_are_listed_once_and_a_named_file_may_have_any_suffix(folder):
    paths = [folder / "notes.txt", folder / "b", folder / "b" / "d.png"]
    assert [os.path.relpath(path, folder) for path in list_images(paths)] == [
        "notes.txt", "b/d.png", "b/g.jpeg", "b/page.jpg",
    ]  # fmt: skip


def test_links_to_nothing_are_named_and_pipes_are_left_out(trained, tmp_path):
    (tmp_path / "gone.png").symlink_to("/absent")
    os.mkfifo(tmp_path / "pipe.png")
    [found] = scconv_jax.predict(tmp_path, trained)
    assert found == (str(tmp_path / "gone.png"), (), "No such file or directory")


def test_suffixes_are_those_of_the_trainer():
    assert SUFFIXES == index.SUFFIXES


def test_little_is_decoded_ahead(trained, folder, monkeypatch):
    decoded = []
    read = predictions.image_files.pixels
    monkeypatch.setattr(predictions.image_files, "pixels", lambda image, *rest: decoded.append(image) or read(image, *rest))
    found = predict_each(trained, [str(folder / "c.jpg")] * 100, batch_size=2)
    next(found)
    assert len(decoded) < 20
    found.close()


def test_the_command_prints_a_line_for_each_image(run, folder, capsys):
    assert main(["predict", str(folder), "--weights", str(run), "--top", "1"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(folder / name) for name in READABLE]
    assert all(line.endswith("%") for line in lines)
    assert f"{run}: scnet20_small, 3 classes\nnote: The best checkpoint, of step 5, was taken." in err
    assert f"skipped {folder}/b/page.jpg: not an image\n" in err
    assert "5 images in" in err
    assert "2 skipped" in err
    assert main(["predict", str(folder / "c.jpg"), "--weights", str(run), "--checkpoint", "latest"]) == 0
    out, err = capsys.readouterr()
    assert "note: The latest checkpoint, of step 10, was taken." in err
    assert out.count("%") == 3, "a network of three classes has no five"


def test_answers_in_a_file(run, folder, tmp_path, capsys):
    for suffix in ("csv", "json"):
        assert main(["predict", str(folder), "--weights", str(run), "--top", "2", "--out", str(tmp_path / f"x.{suffix}")]) == 1
        assert capsys.readouterr().out == ""
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(rows[0]) == ["image", "rank", "label", "class", "name", "probability"]
    assert [(row["image"], row["rank"]) for row in rows] == [(str(folder / name), rank) for name in READABLE for rank in "12"]
    assert [row["skipped"] for row in [found]] == [
        [
            {"image": str(folder / "b/page.jpg"), "reason": "not an image"},
            {"image": str(folder / "half.jpg"), "reason": found["skipped"][1]["reason"]},
        ]
    ]
    assert (found["weights"], found["model"]) == (str(run), "scnet20_small")
    answers = [answer for row in found["images"] for answer in row["answers"]]
    of_run = {"cat": "cat", "<b>dog</b>": "<b>dog</b>", "n01440764": "tench"}
    for row, answer in zip(rows, answers, strict=True):
        assert {key: str(value) for key, value in answer.items()} == {key: row[key] for key in answer}
        assert of_run[row["class"]] == row["name"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.txt"], "--out x.txt: its name must end in .csv or .json, to give the format."),
        (["--out", "absent/x.csv"], "There is no folder absent to write x.csv in; make it first."),
        (["--out", "gs://bucket/x.csv"], "gs://bucket/x.csv is an address, not a folder of this machine"),
        (["--top", "0"], "--top 0 must be 1 or more."),
        (["--batch-size", "-1"], "--batch-size -1 must be 1 or more."),
        (["--threads", "0"], "--threads 0 must be 1 or more."),
        (["--checkpoint", "7"], "it has no checkpoint of step 7, but of step 5, 10."),
    ],
)
def test_mistakes_in_the_command(run, folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(folder), "--weights", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, len(err.splitlines()), list(tmp_path.iterdir())) == ("", 1, [])


def test_a_long_name_of_a_class_is_cut_in_a_line():
    answers = (Answer(0, "a" * 200, 0.75), Answer(1, "b", 0.25))
    assert _line(Prediction("x.png", answers)) == f"x.png: {'a' * 79}… 75.0%, b 25.0%"


def test_no_image_can_be_read(run, tmp_path, capsys):
    (tmp_path / "a.jpg").write_text("x")
    assert main(["predict", str(tmp_path), "--weights", str(run), "--out", str(tmp_path / "x.csv")]) == 2
    assert "None of the 1 files is an image that can be read." in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_a_name_with_control_sequences_is_printed_without_them(run, tmp_path, capsys):
    (tmp_path / "\x1b[31mred.jpg").write_bytes(encoded(photo(32, 32)))
    (tmp_path / "\x1b[31mbad.jpg").write_bytes(b"")
    assert main(["predict", str(tmp_path), "--weights", str(run)]) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "?[31mred.jpg" in out


def test_without_pillow(run, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["predict", str(folder), "--weights", str(run)]) == 2
    assert "pip install 'scconv-jax[images]'" in capsys.readouterr().err
    assert Path(folder).exists()
