"""The folders and files that people have: hidden and special files, other suffixes, other layouts."""

import contextlib
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tests.image_files import RED, encoded, photo
from tests.train.data.test_folder import data, fill, listed
from train.config import ConfigError
from train.data import index
from train.data.batches import UnreadableImageError
from train.data.datasets import load_dataset
from train.data.folder import open_folder
from train.data.index import SUFFIXES, load_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path / "cache"))


def both(*files):
    """Return each file in train and in val."""
    return [f"{split}/{file}" for split in ("train", "val") for file in files]


HIDDEN = [
    ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000", "lost+found", "$RECYCLE.BIN", "System Volume Information",
   "#recycle",    ".AppleDouble", ".Spotlight-V100", ".git", "@Recycle", "#snapshot", "@tmp", "found.000", "LOST.DIR",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_or_system_folder_is_no_class_and_holds_no_images(tmp_path, name):
    root = tmp_path / "set"
    fill(root, ["cat/1.jpg", "dog/1.jpg", f"{name}/1.jpg", f"{name}/in/1.jpg", f"dog/{name}/1.jpg", f"dog/in/{name}/1.jpg"])
    records = load_index(root)
    assert records.classes == ("cat", "dog")
    assert [label for _, label in listed(records)] == [0, 1]
    assert records.left_out == {name: 3}


def test_what_is_left_out_is_said_once_also_from_the_cache(tmp_path, monkeypatch):
    junk = [
        "._1.jpg",
        "._2.jpg",
        ".hidden.png",
        "Thumbs.db",
        ".DS_Store",
        "desktop.ini",
        "notes.TXT",
        "README",
        "x.jpg~",
        "y.1234",
    ]
    files = [f"cat/{name}" for name in ["1.jpg", *junk]] + ["dog/1.jpg", "labels.csv", "stray.jpg", "#recycle/1.jpg"]
    fill(tmp_path, both(*files))
    _, _, notes = open_folder(str(tmp_path))
    what = (
        "files of no known suffix (3), ._* (2), #recycle, *.csv, *.db, *.ini, *.jpg outside class folders, *.txt, .*, .DS_Store; "
        "13 in all."
    )
    assert notes == [f"{tmp_path.resolve() / split}: left out {what}" for split in ("train", "val")]
    monkeypatch.setattr(index, "_scan", None)
    assert open_folder(str(tmp_path))[2] == notes


def test_an_index_by_other_rules_is_not_used(tmp_path, monkeypatch):
    fill(tmp_path / "set", ["cat/1.jpg", "dog/1.jpg", "dog/2.heic"])
    assert len(load_index(tmp_path / "set")) == 2
    monkeypatch.setattr(index, "SUFFIXES", (*SUFFIXES, ".heic"))
    monkeypatch.setattr(index, "RULES", "others")
    assert len(load_index(tmp_path / "set")) == 3


def test_every_suffix_is_one_that_pil_reads():
    Image.init()
    known = Image.registered_extensions() | {".avif": "AVIF", ".avifs": "AVIF"}  # Pillow before 11.3
    assert {known[suffix] for suffix in SUFFIXES} <= set(Image.OPEN) | {"AVIF", "MPO"}
    for suffix in (".jfif", ".jpe", ".gif", ".avif", ".jp2"):
        assert suffix in SUFFIXES
    not_pictures = {
        ".bufr",
        ".eps",
        ".fit",
        ".fits",
        ".grib",
        ".h5",
        ".hdf",
        ".mpeg",
        ".mpg",
        ".pdf",
        ".ps",
        ".wmf",
        ".emf",
        ".pfm",
    }
    assert not not_pictures & set(SUFFIXES)


def test_files_of_every_suffix_become_the_same_picture(tmp_path):
    """All suffixes whose format PIL can write in colour; the others differ only in the decoder."""
    Image.init()
    extensions, image = Image.registered_extensions(), Image.new("RGB", (32, 32), (200, 40, 60))
    suffixes = [s for s in sorted(SUFFIXES) if extensions.get(s) in Image.SAVE and s not in (".msp", ".xbm")]
    suffixes = [s for s in suffixes if s not in (".avif", ".avifs") or features.check("avif")]
    for split in ("train", "val"):
        for number, suffix in enumerate(suffixes):
            path = tmp_path / split / "ab"[number % 2] / f"x{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    dataset = load_dataset(data(tmp_path))
    assert len(dataset.train) == len(dataset.test) == len(suffixes) > 25
    for source in (dataset.train, dataset.test):
        for number in range(len(suffixes)):
            out = np.empty((16, 16, 3), np.uint8)
            source.load(number, (0,), out)
            assert np.abs(out.astype(int) - (200, 40, 60)).max() <= 4, source.records.name(number)


def noisy_tiff():
    """Return a TIFF with a tag that PIL skips with a warning."""
    tiff = bytearray(encoded(RED, "TIFF"))
    entries = int.from_bytes(tiff[4:8], "little") + 2
    last = entries + 12 * (int.from_bytes(tiff[entries - 2 : entries], "little") - 1)
    tiff[last : last + 12] = (0xFFF0).to_bytes(2, "little") + (2).to_bytes(2, "little") + (10**6).to_bytes(4, "little") * 2
    return bytes(tiff)


def test_large_images_and_odd_metadata_are_read_without_a_word(tmp_path, monkeypatch, capfd):
    """Warnings are errors here. PIL's limit on pixels is set lower than these images have."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    files = [encoded(RED), encoded(RED, "PNG"), encoded(RED, "WEBP"), encoded(RED, "GIF"), noisy_tiff()]
    for split in ("train", "val"):
        for number, file in enumerate([*files, *files]):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
    dataset = load_dataset(data(tmp_path))
    for source in (dataset.train, dataset.test):
        for number in range(2 * len(files)):
            source.load(number, (0,), np.empty((16, 16, 3), np.uint8))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_limit_on_pixels_is_that_of_the_config_in_training_and_testing(tmp_path, capsys, kind):
    for name in both("cat/1.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encoded(photo(40, 50), kind))
    for limit, reads in ((2000, True), (1999, False)):
        dataset = load_dataset(data(tmp_path, max_pixels=limit))
        for source in (dataset.train, dataset.test):
            with contextlib.nullcontext() if reads else pytest.raises(UnreadableImageError):
                source.load(0, (0,), np.empty((16, 16, 3), np.uint8))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("cat/1.png: 50 × 40 pixels, more than max_pixels 1,999 (" in line for line in lines)
    with pytest.raises(ConfigError, match=r"Data.max_pixels must be at least 1, found 0"):
        data(tmp_path, max_pixels=0)


def test_only_regular_files_are_opened(tmp_path):
    fill(tmp_path, both("cat/1.jpg", "dog/1.jpg"))
    cat = tmp_path / "train" / "cat"
    os.mkfifo(cat / "pipe.jpg")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(cat / "socket.jpg"))
    (cat / "2-link-to-a-pipe.jpg").symlink_to("pipe.jpg")
    (cat / "3-link-to-a-socket.jpg").symlink_to("socket.jpg")
    (cat / "4-device.jpg").symlink_to("/dev/zero")
    dataset = load_dataset(data(tmp_path))
    server.close()
    assert dataset.notes == (f"{cat.parent}: left out pipe.jpg (not a regular file), socket.jpg (not a regular file); 2 in all.",)
    for number, reason in enumerate(("not a regular file", "No such device or address", "not a regular file"), start=1):
        with pytest.raises(UnreadableImageError, match=reason):
            dataset.train.load(number, (0,), np.empty((16, 16, 3), np.uint8))


def test_a_file_that_becomes_a_pipe_is_unreadable(tmp_path):
    fill(tmp_path, both("cat/1.jpg", "dog/1.jpg"))
    dataset = load_dataset(data(tmp_path))
    (tmp_path / "val/cat/1.jpg").unlink()
    os.mkfifo(tmp_path / "val/cat/1.jpg")
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        dataset.test.load(0, (), np.empty((16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (both("images/cat/1.jpg", "images/dog/1.jpg"), "",
         r"train holds a single class, images: it must hold a folder for each of two classes or more, train/CLASS/IMAGE. "
         r"The classes may be the folders in images \(cat, dog\): move them to .*/train$"),
        (both("all/1.jpg", "all/2.jpg"), "", "train holds a single class, all: .*, train/CLASS/IMAGE$"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/images/cat/1.jpg", "val/images/dog/1.jpg"], "",
         r"only in val: images. The classes may be the folders in images \(cat, dog\): move them to .*/val$"),
        (both("cat/1.jpg", "dog/1.jpg"), "train", r"no train and no val \(found cat, dog\). .* holds both: give that folder$"),
        (both("cat/1.jpg", "dog/1.jpg"), "val/dog", r"\(found 1.jpg\). .* holds both: give that folder$"),
        ([f"set/{name}" for name in both("cat/1.jpg", "dog/1.jpg")], "", r"\(found set\). .*/set holds both: give that folder$"),
        (["cat/1.jpg", "dog/1.jpg"], "",
         r"\(found cat, dog\). To test on a fifth of the images of each class folder of .*: --data.val-fraction 0.2$"),
        (["train/cat/1.jpg", "train/dog/1.jpg"], "", r"no val \(found train\). .* folder of .*/train: --data.val-fraction 0.2$"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "valid/cat/1.jpg"], "",
         r"no val \(found train, valid\). If valid holds the test images, name it val: mv .*/valid .*/val$"),
        ([*both("cat.tar", "dog.tar"), "val/cat/1.jpg"], "", r"train must hold a folder for each class, found \*.tar \(2\)$"),
        (["a.txt"], "", r"no train and no val \(found a.txt\)$"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/b.jpg", "val/a.jpg", "val/c.txt"], "",
         r"val must hold a folder for each class, found \*.jpg \(2\), \*.txt: move each image into the folder of its class, "
         r"val/CLASS/a.jpg$"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/ILSVRC2012_val_00000001.JPEG"], "",
         r"found \*.jpeg, as ImageNet's archive unpacks: run valprep.sh of github.com/soumith/imagenetloader.torch in that "
         r"folder$"),
    ],
)  # fmt: skip
def test_another_layout_is_an_error_that_says_what_was_meant(tmp_path, files, given, message):
    fill(tmp_path, files)
    with pytest.raises(ConfigError, match=message) as raised:
        open_folder(str(tmp_path / given))
    assert "\n" not in str(raised.value)


def test_names_that_no_terminal_prints_are_escaped(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "two\nlines"]
    fill(tmp_path, both("a/1.jpg", "b/1.jpg", *[f"a/.{name}" for name in names], *[f"{name}/a/1.jpg" for name in names[:1]]))
    assert open_folder(str(tmp_path))[2][0].endswith(r"train: left out .caf\udce9, .two\nlines; 2 in all.")
    fill(tmp_path, [f"train/{name}/1.jpg" for name in names])
    os.utime(tmp_path / "train", (2e9, 2e9))
    with pytest.raises(ConfigError, match=r"only in train: two\\nlines$"):
        open_folder(str(tmp_path))


def test_classes_one_level_too_high_are_said(tmp_path):
    fill(tmp_path, both("pets/cat/1.jpg", "pets/dog/1.jpg", "cars/van/1.jpg"))
    _, _, notes = open_folder(str(tmp_path))
    assert notes[0] == (
        f"{tmp_path / 'train'}: no image lies directly in a class folder, but in folders below, such as cars/van; the classes "
        "are the upper folders, such as cars."
    )


def test_testing_needs_no_training_images(tmp_path):
    fill(tmp_path, ["val/cat/1.jpg", "val/dog/1.jpg"])
    train, test, notes = open_folder(str(tmp_path), testing=True)
    assert (len(train), train.classes) == (0, ("cat", "dog"))
    assert [label for _, label in listed(test)] == [0, 1]
    assert notes == [f"{tmp_path} has no train: the 2 classes are those of val."]
    (tmp_path / "train").mkdir()
    assert open_folder(str(tmp_path), testing=True)[2] == [f"{tmp_path} has no classes in train: the 2 classes are those of val."]
    shutil.rmtree(tmp_path / "val" / "dog")
    with pytest.raises(ConfigError, match="val holds a single class, cat"):
        open_folder(str(tmp_path), testing=True)


def test_testing_takes_some_of_the_classes_of_train_with_their_numbers(tmp_path):
    fill(tmp_path, ["train/ape/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "train/dog/1.jpg", "val/bee/1.jpg", "val/dog/1.jpg"])
    _, test, notes = open_folder(str(tmp_path), testing=True)
    assert test.classes == ("ape", "bee", "cat", "dog")
    assert [label for _, label in listed(test)] == [1, 3]
    assert notes == [f"{tmp_path / 'val'} has no images of 2 of the 4 classes of train: ape, cat."]
    with pytest.raises(ConfigError, match=r"the same classes; only in train: ape, cat$"):
        open_folder(str(tmp_path))
    fill(tmp_path, ["val/emu/1.jpg"])
    os.utime(tmp_path / "val", (2e9, 2e9))
    with pytest.raises(ConfigError, match=r"holds classes that train does not hold: emu$"):
        open_folder(str(tmp_path), testing=True)


def paths(records):
    return [os.path.relpath(records.name(i), records.root) for i in range(len(records))]


@pytest.mark.parametrize("below", ["", "train"])
def test_a_fraction_of_each_class_is_for_testing(tmp_path, below):
    root = tmp_path / "set"
    files = (
        [f"cat/{i}.jpg" for i in range(10)]
        + [f"dog/in/{i}.jpg" for i in range(23)]
        + ["dog/x.jpg", "emu/1.jpg", "fox/1.jpg", "fox/2.jpg"]
    )
    fill(root / below, [*files, ".ipynb_checkpoints/1.jpg"])
    train, test, notes = open_folder(str(root), val_fraction=0.2)
    assert sorted(paths(train) + paths(test)) == sorted(files)
    assert np.bincount([label for _, label in listed(test)]).tolist() == [2, 5, 0, 1]
    for records in (train, test):
        assert [Path(path).parts[0] for path in paths(records)] == [records.classes[label] for _, label in listed(records)]
    assert notes[1] == (
        f"{root / below}: 0.2 of the images of each class are for testing (data.val_fraction, by seed 0), 8 of 37; "
        "none of emu, with one image each."
    )
    assert paths(open_folder(str(root), val_fraction=0.2)[1]) == paths(test)
    assert paths(open_folder(str(root), val_fraction=0.2, seed=1)[1]) != paths(test)


def test_an_image_stays_where_it_is_when_the_folder_moves_or_grows(tmp_path):
    fill(tmp_path / "a", [f"{cls}/{i}.jpg" for cls in ("cat", "dog") for i in range(50)])
    _, before, _ = open_folder(str(tmp_path / "a"), val_fraction=0.2)
    assert paths(before)[:3] == ["cat/10.jpg", "cat/14.jpg", "cat/16.jpg"]  # in every version, on every machine
    (tmp_path / "a").rename(tmp_path / "b")
    assert paths(open_folder(str(tmp_path / "b"), val_fraction=0.2)[1]) == paths(before)
    fill(tmp_path / "b", ["cat/new.jpg"])
    os.utime(tmp_path / "b/cat", (2e9, 2e9))
    train, _, _ = open_folder(str(tmp_path / "b"), val_fraction=0.2)
    assert len(set(paths(train)) & set(paths(before))) <= 1


def test_a_fraction_of_a_folder_with_val_is_an_error(tmp_path):
    fill(tmp_path, both("cat/1.jpg", "dog/1.jpg"))
    with pytest.raises(ConfigError, match=r"data.val_fraction must be 0, found 0.2: .* holds its test images in val$"):
        open_folder(str(tmp_path), val_fraction=0.2)
    for name, cure in (("digits", ""), ("tfds", r", so use --data.train-split train\[:80%\] --data.test-split train\[80%:\]")):
        with pytest.raises(
            ConfigError, match=rf"data.val_fraction 0.2 divides a folder of image files; data.name is {name}{cure}$"
        ):
            load_dataset(replace(data(tmp_path, val_fraction=0.2), name=name))
    with pytest.raises(ConfigError, match=r"Data.val_fraction must be at least 0 and under 1, found 1"):
        data(tmp_path, val_fraction=1.0)
