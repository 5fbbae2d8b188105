import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.config import ConfigError, Data
from train.data import index
from train.data.batches import UnreadableImageError, eval_batches, train_batches
from train.data.datasets import load_dataset
from train.data.folder import open_folder
from train.data.index import load_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "folders"


def fill(root, files):
    """Make empty files that have not changed for a long time, like those of a data set."""
    for name in files:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    settle(root)


def settle(root):
    for path, _, _ in os.walk(root):
        os.utime(path, (1e9, 1e9))


def listed(records):
    return [(records.name(i), records.labels[records._folder(i)]) for i in range(len(records))]


def as_imagefolder(root):
    """Return the classes, paths and labels that torchvision's `ImageFolder` lists, by the rules of its documentation."""
    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    return classes, [
        (os.path.join(path, name), label)
        for label, cls in enumerate(classes)
        for path, _, names in sorted(os.walk(os.path.join(root, cls), followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(extensions)
    ]


NAMES = [
    "b/2.jpg", "b/10.jpeg", "b/1.JPG", "b/note.txt", "b/seen.png", "B/x.webp", "a b/x.png", "a/z.tiff", "a/in/side.bmp",
    "a/in.2/y.ppm", "a/in/deep/er.pgm", "é/ü.tif", "10/only/below/this.jpg", "9/x.jpg", "9/odd.jpg.bak", "stray.jpg",
]  # fmt: skip


def test_images_and_labels_are_those_of_imagefolder(tmp_path):
    root = tmp_path.resolve() / "set"
    fill(root, NAMES)
    (root / "c.jpg").mkdir()  # a class whose name looks like a file
    (root / "c.jpg" / os.fsdecode(b"\xff.png")).touch()
    (root / "9" / "link.png").symlink_to("x.jpg")
    (root / "9" / "broken.png").symlink_to("nowhere")
    (root / "9" / "linked").symlink_to(root / "b")
    classes, expected = as_imagefolder(root)
    records = load_index(root)
    assert list(records.classes) == classes
    assert listed(records) == expected
    assert len(records) == len(expected) == 20


def test_links_in_a_circle_lead_nowhere(tmp_path):
    root = tmp_path / "set"
    fill(root, ["a/x.jpg", "a/in/y.jpg", "b/z.jpg"])
    (root / "a" / "in" / "up").symlink_to("..")
    (root / "a" / "in" / "top").symlink_to(root)
    (root / "a" / "self.jpg").symlink_to("self.jpg")
    (root / "self").symlink_to("self")
    records = load_index(root)
    assert [os.path.relpath(name, root) for name, _ in listed(records)] == ["a/self.jpg", "a/x.jpg", "a/in/y.jpg", "b/z.jpg"]


def test_the_second_time_no_folder_is_read(tmp_path, monkeypatch, cache):
    root = tmp_path / "set"
    fill(root, NAMES)
    first = load_index(root)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(index, "_scan", None)
    second = load_index(root)
    assert listed(second) == listed(first)
    assert second.classes == first.classes


@pytest.mark.parametrize("place", ["new.png", "a/in/new.png", "new/new.png"])
def test_a_change_anywhere_is_seen(tmp_path, place):
    root = tmp_path / "set"
    fill(root, NAMES)
    before = load_index(root)
    fill(root / "kept", ["x.png"])  # so that a stray new.png does not stand alone
    load_index(root)
    path = root / place
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert len(load_index(root)) == len(before) + 1 + (place != "new.png")
    path.unlink()
    if place == "new/new.png":
        path.parent.rmdir()
    assert len(load_index(root)) == len(before) + 1


def test_a_folder_that_has_only_just_changed_is_not_kept(tmp_path, cache):
    """A second change within the same clock tick would not be noticed."""
    fill(tmp_path / "set", NAMES)
    (tmp_path / "set" / "a" / "new.png").touch()
    load_index(tmp_path / "set")
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense"])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, content):
    root = tmp_path / "set"
    fill(root, NAMES)
    first = load_index(root)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert listed(load_index(root)) == listed(first)
    assert path.stat().st_size > 100


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path, cache):
    cache.parent.touch()  # a file in the way: root may write anywhere else
    fill(tmp_path / "set", NAMES)
    assert len(load_index(tmp_path / "set")) == len(load_index(tmp_path / "set")) > 0


def test_the_index_of_an_image_is_right_at_every_border(tmp_path):
    fill(tmp_path, [f"train/{c}/{i}.jpg" for c in range(11) for i in range(1 + c % 3)])
    fill(tmp_path, [f"val/{c}/0.jpg" for c in range(11)])
    train, test, notes = open_folder(str(tmp_path))
    assert [Path(train.name(i)).parent.name for i in range(len(train))] == [train.classes[label] for _, label in listed(train)]
    assert len(test) == 11
    assert notes == []
    assert test.read(0) == (b"", 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["val/a/x.jpg"], r"data.dir must hold train/CLASS/IMAGE and val/CLASS/IMAGE; .* has no train \(found val\)"),
        (["x/y.jpg"], r"has no train and no val \(found x\)"),
        (["train/x.txt", "val/a/x.jpg"], r"train must hold a folder for each class, found \*.txt$"),
        (
            ["train/a/x.jpg", "train/b/x.txt", "train/b/y.heic", "val/a/x.jpg"],
            r"train holds class folders without an image: b \(found \*.heic, \*.txt\)$",
        ),
        (
            ["train/a/x.jpg", "train/b/x.jpg", "val/a/x.jpg", "val/c/x.jpg"],
            "must hold the same classes; only in train: b; only in val: c$",
        ),
        (["train/a/x.jpg", "train/b/x.jpg", "val/a/x.jpg"], "the same classes; only in train: b$"),
    ],
)
def test_a_folder_of_another_layout_is_an_error(tmp_path, files, message):
    fill(tmp_path, files)
    with pytest.raises(ConfigError, match=message):
        open_folder(str(tmp_path))


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data.dir: there is no folder .*nowhere"):
        open_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data.dir must be the folder .*, found ''"):
        open_folder("")


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    """A replaced `scandir` refuses, because the root user may read everything."""
    fill(tmp_path, ["train/a/x.jpg", "val/a/x.jpg"])

    def scandir(path, scandir=os.scandir):
        if os.fspath(path).endswith("a"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"^data.dir: cannot read .*train/a: Permission denied$"):
        open_folder(str(tmp_path))


@pytest.fixture
def colors(tmp_path):
    """Two classes, red and blue: 6 and 4 training images of different sizes, 3 test images."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (6, 4)), ("val", (2, 1))):
        for name, color, count in (("red", (220, 20, 30), counts[0]), ("sky", (20, 30, 220), counts[1])):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                size = rng.integers(20, 90, 2)
                Image.new("RGB", tuple(map(int, size)), color).save(tmp_path / split / name / f"{i}.jpg", quality=95)
    return tmp_path


def data(root, **options):
    return Data(name="folder", dir=str(root), image_size=16, batch_size=4, **options)


def test_batches_of_a_folder(colors):
    dataset = load_dataset(data(colors))
    assert (len(dataset.train), len(dataset.test), dataset.classes, dataset.num_classes) == (10, 3, ("red", "sky"), 2)
    assert dataset.image_shape == (16, 16, 3)
    assert dataset.mean == (0.485, 0.456, 0.406)
    assert load_dataset(data(colors, mean=(0.1, 0.2, 0.3))).mean == (0.1, 0.2, 0.3)

    def check(batch):
        assert batch["image"].dtype == np.uint8
        blue = batch["image"][..., 2].mean((1, 2)) > 128
        assert blue.tolist() == (batch["label"] == 1).tolist()

    batches = train_batches(dataset.train, 4, seed=0, first_step=0, threads=2)
    epoch = [next(batches) for _ in range(2)]
    for batch in epoch:
        check(batch)
    (batch,) = eval_batches(dataset.test, 4, threads=2)
    assert batch["label"].tolist() == [0, 0, 1, 0]
    assert batch["weight"].tolist() == [1, 1, 1, 0]


def test_crops_differ_between_epochs_and_are_the_same_in_another_run(colors):
    rng = np.random.default_rng(0)
    for path in colors.glob("train/*/*.jpg"):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    source = load_dataset(data(colors)).train

    def images(first_step, threads):
        batches = train_batches(source, 10, seed=3, first_step=first_step, threads=threads)
        return [batch["image"][np.argsort(batch["label"], kind="stable")] for _, batch in zip(range(2), batches, strict=False)]

    first, second = images(0, threads=1)
    np.testing.assert_array_equal(first, images(0, threads=3)[0])
    np.testing.assert_array_equal(second, images(1, threads=2)[0])
    assert (first != second).any()


def test_unreadable_images_are_named_and_skipped_up_to_the_limit(colors, capsys):
    (colors / "train/red/3.jpg").write_bytes(b"")
    (colors / "val/sky/0.jpg").write_text("<html>")
    dataset = load_dataset(data(colors, max_bad_images=2))
    batches = train_batches(dataset.train, 4, seed=0, first_step=0, threads=2)
    for _ in range(6):
        assert next(batches)["image"].min() < 60
    (batch,) = eval_batches(dataset.test, 4, threads=2)
    assert batch["weight"].tolist() == [1, 1, 0, 0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "one line for each image"
    assert lines[0].startswith("skipped unreadable image ")
    assert lines[0].endswith("train/red/3.jpg: not an image (1 of at most 2)")
    assert lines[1].endswith("val/sky/0.jpg: not an image (2 of at most 2)")


def test_one_unreadable_image_too_many_is_an_error(colors):
    for name in ("train/red/3.jpg", "train/sky/0.jpg", "train/sky/1.jpg"):
        (colors / name).write_bytes(b"")
    dataset = load_dataset(data(colors, max_bad_images=2))
    with pytest.raises(ConfigError, match=r"more than data.max_bad_images 2 images cannot be read: .*3.jpg") as raised:
        for _ in zip(range(6), train_batches(dataset.train, 4, seed=0, first_step=0, threads=2), strict=False):
            pass
    assert all(name in str(raised.value) for name in ("sky/0.jpg", "sky/1.jpg", "--data.max-bad-images"))


def test_an_image_that_has_gone_is_unreadable(colors):
    dataset = load_dataset(data(colors))
    (colors / "train/red/0.jpg").unlink()
    with pytest.raises(UnreadableImageError, match="No such file"):
        dataset.train.load(0, (0,), np.empty((16, 16, 3), np.uint8))
