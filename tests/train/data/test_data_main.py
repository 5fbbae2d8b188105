"""Folders of images and data sets of TensorFlow Datasets, through the whole command line with a tiny network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scconv_jax
from tests.train.tiny import create_tiny, final_arrays
from train.config import Data
from train.data.datasets import ArraySource, load_dataset, load_digits
from train.main import main
from train.prepare import prepare_folder

SMALL = """
from train.config import Config, Data, Log, Optim

config = Config(
    epochs=2,
    log_every=4,
    data=Data(name="folder", image_size=16, resize=16, batch_size=16, crop_scale=(0.5, 1.0), threads=2),
    optim=Optim(lr=0.1),
    log=Log(report=False),
)
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scconv_jax, "create_model", create_tiny)
    Path("small.py").write_text(SMALL)


@pytest.fixture
def digits(tmp_path):
    """The first three digits as JPEG files: 66 training and 20 test images."""
    dataset, root = load_digits(Data(image_size=16)), tmp_path / "digits"
    for split, source, count in (("train", dataset.train, 66), ("val", dataset.test, 20)):
        assert isinstance(source, ArraySource)
        chosen = np.flatnonzero(source.labels < 3)[:count]
        for i in chosen:
            path = root / split / str(source.labels[i]) / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[i]).save(path, quality=95)
    return root


def metrics(workdir):
    timing = {"images_per_second", "waiting_for_data", "multiply_adds_per_second", "seconds"}
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def run(capsys, *arguments):
    """Return the exit code and the last line on stderr."""
    code = main([*map(str, arguments), "--config", "small.py"])
    return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]


def test_grey_images(capsys, digits):
    """With one channel, from decoding to the network, and through every augmentation."""
    flags = ["--data.channels", "1", "--augment.randaugment", "1", "--augment.mixup", "0.2", "--epochs", "1"]
    assert main([str(digits), "--config", "small.py", "--workdir", "grey", *flags]) == 0
    assert final_arrays("grey")["params/conv/kernel"].shape == (3, 3, 1, 8)
    assert main(["--workdir", "grey", "--evaluate"]) == 0
    assert "of 20)" in capsys.readouterr().out
    dataset = load_dataset(Data(name="folder", dir=str(digits), image_size=16, resize=16, channels=1))
    found, first = np.empty((16, 16, 1), np.uint8), sorted(digits.glob("val/*/*.jpg"))[0]
    dataset.test.load(0, (), found)
    np.testing.assert_array_equal(found[..., 0], np.asarray(Image.open(first).convert("L")))
    assert dataset.mean == (np.mean([0.485, 0.456, 0.406]),)


def test_a_folder_trains_and_so_does_the_same_prepared(digits, capsys):
    """Both runs have the same images in the same order with the same crops, so every number agrees."""
    pytest.importorskip("tensorflow_datasets", reason="a test of the extra tfds")
    assert run(capsys, digits, "--workdir", "a")[0] == 0
    prepare_folder(str(digits), Path("prepared"), workers=2)
    assert run(capsys, "prepared", "--workdir", "b")[0] == 0
    assert metrics("a") == metrics("b")
    assert metrics("a")[-1]["step"] == 8
    assert json.loads(Path("b/config.json").read_text())["data"]["name"] == "tfds"
    assert "validation" not in str(metrics("a")[-1])


def test_a_run_on_a_folder_resumes_where_it_stopped(digits, capsys):
    assert run(capsys, digits, "--workdir", "whole")[0] == 0
    assert run(capsys, digits, "--workdir", "halved", "--epochs", "1", "--optim.schedule", "step")[0] == 0
    assert run(capsys, digits, "--workdir", "step", "--optim.schedule", "step")[0] == 0
    assert main(["--workdir", "halved", "--resume", "--epochs", "2"]) == 0
    assert metrics("halved")[-1] == metrics("step")[-1]


def test_weights_can_be_tested_with_fewer_training_images_than_a_batch(digits, capsys):
    assert run(capsys, digits, "--workdir", "a", "--epochs", "1")[0] == 0
    assert main(["--config", "small.py", "--evaluate", "--init", "a", "-b", "80", str(digits)]) == 0
    assert f"test accuracy {100 * metrics('a')[-1]['eval/top1']:.2f} %" in capsys.readouterr().out


def test_a_folder_of_classes_is_divided_and_stays_so(digits, capsys):
    """Its test images stay test images: in an evaluation, and with any option of a resumed run."""
    for path in digits.glob("val/*/*"):
        path.rename(digits / "train" / path.parent.name / path.name)
    (digits / "train" / ".ipynb_checkpoints").mkdir()
    divided = [str(digits / "train"), "--data.val-fraction", "0.25"]
    assert main([*divided, "--workdir", "a", "--epochs", "1", "--config", "small.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("train: left out .ipynb_checkpoints; 1 in all.")
    assert lines[1].endswith("0.25 of the images of each class are for testing (data.val_fraction, by seed 0), 22 of 84.")
    assert "; folder, 3 classes: 1 epoch of 3 steps of 16 images. Writing to a" in lines[2]
    assert metrics("a")[-1]["eval/images"] == 22
    assert main(["--workdir", "a", "--evaluate"]) == 0
    assert f"test accuracy {100 * metrics('a')[-1]['eval/top1']:.2f} % (" in capsys.readouterr().out
    for flags, wrong in ((["--seed", "1"], "seed 0, not 1"), (["--data.val-fraction", "0.2"], "data.val_fraction 0.25, not 0.2")):
        for command in (["--resume"], ["--evaluate"]):
            assert main(["--workdir", "a", *command, *flags]) == 2
            assert f"a holds a run with {wrong}" in capsys.readouterr().err


def test_a_run_is_tested_without_its_training_images(digits, capsys):
    assert run(capsys, digits, "--workdir", "a", "--epochs", "1")[0] == 0
    shutil.rmtree(digits / "train" / "1")
    assert main(["--workdir", "a", "--evaluate"]) == 2
    assert "val of" in capsys.readouterr().err
    shutil.rmtree(digits / "train")
    assert main(["--workdir", "a", "--evaluate"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{digits} has no train: the 3 classes are those of val."
    assert f"test accuracy {100 * metrics('a')[-1]['eval/top1']:.2f} % (" in last


def test_a_run_does_not_resume_with_more_images(digits, capsys):
    """The step would mean another position in another order."""
    assert run(capsys, digits, "--workdir", "a", "--epochs", "1")[0] == 0
    image = next(iter(digits.glob("train/*/*.jpg")))
    shutil.copy(image, image.with_name("copy.jpg"))
    assert main(["--workdir", "a", "--resume", "--epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert "/checkpoints/4 was written with 66 training images, but there are 67 now. The dataset has changed" in error
    assert sorted(path.name for path in Path("a/checkpoints").iterdir()) == ["4"]
    image.with_name("copy.jpg").unlink()
    assert main(["--workdir", "a", "--resume", "--epochs", "2"]) == 0


def test_too_many_unreadable_images_end_the_run_with_one_line(digits, capsys):
    images = sorted(digits.glob("train/*/*.jpg"))
    for path in images[:3]:
        path.write_bytes(b"")
    code, error = run(capsys, digits, "--workdir", "a", "--data.max-bad-images", "2")
    assert code == 2
    assert error.startswith("error: more than data.max_bad_images 2 images cannot be read: ")
    assert error.endswith("Repair or remove them, or allow more (--data.max-bad-images)")
    assert run(capsys, digits, "--workdir", "b", "--data.max-bad-images", "3")[0] == 0


def test_a_test_image_that_cannot_be_read_is_not_counted(digits, capsys):
    next(iter(sorted(digits.glob("val/*/*.jpg")))).write_bytes(b"")
    assert main([str(digits), "--workdir", "a", "--config", "small.py"]) == 0
    last = metrics("a")[-1]
    assert last["eval/images"] == 19
    assert f"({round(19 * last['eval/top1'])} of 19) after the last epoch" in capsys.readouterr().out


def test_a_test_set_without_a_readable_image_is_an_error(digits, capsys):
    for path in digits.glob("val/*/*.jpg"):
        path.write_bytes(b"")
    code, error = run(capsys, digits, "--workdir", "a", "--data.max-bad-images", "100")
    assert (code, error) == (2, "error: no image of the test set can be read")


def one_class(root):
    for path in [*root.glob("*/0"), *root.glob("*/2")]:
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), "error: data.dir must hold train/CLASS/IMAGE and val/CLASS/IMAGE; "),
        (lambda root: shutil.rmtree(root / "val" / "2"), "must hold the same classes; only in train: 2"),
        (lambda root: (root / "train" / "3").mkdir(), "train holds class folders without an image"),
        (one_class, "train holds a single class, 1: "),
        (shutil.rmtree, "error: data.dir: there is no folder "),
    ],
)
def test_a_wrong_folder_is_one_line_and_nothing_is_written(digits, capsys, spoil, message):
    spoil(digits)
    code, error = run(capsys, digits, "--workdir", "a")
    assert code == 2
    assert message in error
    assert not Path("a").exists()


def test_a_run_does_not_go_on_with_other_classes(digits, capsys):
    """Neither training nor testing: the same outputs would mean something else."""
    assert run(capsys, digits, "--workdir", "a", "--epochs", "1")[0] == 0
    for split in ("train", "val"):
        shutil.copytree(digits / split, digits / "two" / split)
        shutil.rmtree(digits / "two" / split / "2")
        (digits / split / "2").rename(digits / split / "two")
    for flags, message in (
        (["--resume"], "was trained on other classes: class 2 is '2' there and 'two' in the data set here"),
        (["--evaluate"], "was trained on other classes: class 2 is '2' there and 'two' in the data set here"),
        (["--evaluate", str(digits / "two")], "was trained on 3 classes, but the data set here has 2"),
    ):
        assert main(["--workdir", "a", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
