import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from train import prepare
from train.config import Config, ConfigError, Data
from train.data.batches import UnreadableImageError, train_batches
from train.data.datasets import load_dataset
from train.data.folder import FolderRecords, open_folder
from train.data.tfds import open_tfds
from train.prepare import prepare_folder
from train.setup import make_setup, save_record

tfds = pytest.importorskip("tensorflow_datasets", reason="a test of the extra tfds")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCCONV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, 23 training and 7 test images, in files of several kinds."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 23), ("val", 7)):
        for i in range(count):
            path = root / split / ("cat", "dog", "élan")[i % 3] / f"{i}.{('jpg', 'png', 'webp')[i % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "Pets, my own"
    prepare_folder(str(folder), out, workers=3, shard=10)
    return out


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


def as_tfrecord(made, out):
    """Write the same set as TFRecord files; their checksums are not read."""
    out.mkdir()
    builder = tfds.builder_from_directory(made)
    template = tfds.core.ShardedFileTemplate(data_dir=out, dataset_name="pets", filetype_suffix="tfrecord")
    infos = []
    for split, info in builder.info.splits.items():
        own = template.replace(split=split)
        records = iter(builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES))
        paths = own.sharded_filepaths(num_shards=len(info.shard_lengths))
        for path, count in zip(paths, info.shard_lengths, strict=True):
            with open(path, "wb") as file:
                for record in (next(records) for _ in range(count)):
                    file.write(struct.pack("<Q", len(record)) + b"crc." + record + b"crc.")
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=info.shard_lengths, num_bytes=1, filename_template=own))
    tfds.folder_dataset.write_metadata(
        data_dir=out, features=builder.info.features, split_infos=infos, filename_template=template, check_data=False
    )
    return out


@pytest.fixture(scope="module")
def tfrecord(made, tmp_path_factory):
    return as_tfrecord(made, tmp_path_factory.mktemp("tfrecord") / "set")


def opened(directory, name="", train="train", test=""):
    return open_tfds(str(directory), name, train, test)


def everything(records):
    return [records.read(i) for i in range(len(records))]


@pytest.mark.parametrize("kind", ["made", "tfrecord"])
def test_a_prepared_folder_holds_the_same_bytes_in_the_same_order(folder, kind, request):
    for original, records in zip(open_folder(str(folder))[:2], opened(request.getfixturevalue(kind)), strict=True):
        assert records.classes == original.classes == ("cat", "dog", "élan")
        assert everything(records) == everything(original)


@pytest.mark.parametrize("kind", ["made", "tfrecord"])
def test_a_part_of_a_split_is_that_part(kind, request):
    directory = request.getfixturevalue(kind)
    whole, _ = opened(directory)
    train, test = opened(directory, train="train[3:21]", test="train[21:]")
    assert everything(train) == everything(whole)[3:21]
    assert everything(test) == everything(whole)[21:]


def test_batches_are_those_of_the_folder(folder, made):
    """Every pixel is the same, the random crops of training included."""
    options = {"image_size": 16, "batch_size": 8}
    sources = [
        load_dataset(Data(name="folder", dir=str(folder), **options)),
        load_dataset(Data(name="tfds", dir=str(made), **options)),
    ]
    batches = [train_batches(dataset.train, 8, seed=1, first_step=0, threads=2) for dataset in sources]
    for _ in range(3):
        of_folder, of_tfds = map(next, batches)
        np.testing.assert_array_equal(of_folder["image"], of_tfds["image"])
        np.testing.assert_array_equal(of_folder["label"], of_tfds["label"])


def test_the_set_is_one_that_tfds_itself_reads(made, folder):
    source = tfds.builder_from_directory(made).as_data_source("validation")
    example = source[0]
    assert example["file_name"] == b"cat/0.jpg"
    assert example["image"].shape == np.asarray(Image.open(folder / "val/cat/0.jpg")).shape
    assert len(list(made.glob("*train*"))) == 3


SILENT = """
import sys
import numpy as np
from train.prepare import main
from train.config import Data
from train.data.datasets import load_dataset
assert main([sys.argv[1], sys.argv[2], "--workers", "1"]) == 0
dataset = load_dataset(Data(name="tfds", dir=sys.argv[2], image_size=16))
image = np.zeros((16, 16, 3), np.uint8)
assert dataset.train.load(3, (1, 2), image) == 0
assert dataset.test.load(3, (), image) == 1
assert image.std() > 10
assert not sys.modules.keys() & {"tensorflow", "torch"}
"""


@pytest.mark.slow
def test_tensorflow_is_never_imported(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    assert "Wrote" in done.stdout
    assert "30.0/30.0" in done.stderr, "the progress bar"


def test_a_set_is_found_by_name(copy, tmp_path):
    pets = shutil.copytree(copy, tmp_path / "all" / "pets" / "1.0.0")
    for name in ("pets", "pets/1.0.0", "pets:1.0.0"):
        assert len(opened(tmp_path / "all", name)[0]) == 23
    shutil.copytree(pets, tmp_path / "all" / "pets" / "2.0.0")
    with pytest.raises(ConfigError, match=r"holds 2 data sets of .* \(pets/1.0.0, pets/2.0.0\): choose one by --data.tfds-name"):
        opened(tmp_path / "all", "pets")
    assert len(opened(tmp_path / "all", "pets/2.0.0")[0]) == 23
    with pytest.raises(ConfigError, match=r"data.tfds_name: there is no folder .*/dogs; .* holds pets$"):
        opened(tmp_path / "all", "dogs")


def test_a_folder_that_is_no_set_is_an_error(folder, copy, tmp_path):
    with pytest.raises(ConfigError, match=r"data.dir must be the folder of one or several data sets of .*, found ''"):
        opened("")
    with pytest.raises(ConfigError, match=r"data.dir: there is no folder .*/nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no data set of TensorFlow Datasets \(a folder with dataset_info.json\)"):
        opened(folder)
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a data set of TensorFlow Datasets: "):
        opened(copy)


def test_a_split_that_is_not_there_is_an_error(copy):
    with pytest.raises(ConfigError, match=r"data.train_split 'trian' of .*: Unknown split 'trian'. Should be one of"):
        opened(copy, train="trian")
    with pytest.raises(ConfigError, match=r"data.train_split 'train\[:0\]' of .* has no images$"):
        opened(copy, train="train[:0]")
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "train"]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match=r"has neither validation nor test \(found train\): choose by --data.test-split"):
        opened(copy)
    assert len(opened(copy, train="train[:20]", test="train[20:]")[1]) == 3


def test_testing_needs_no_training_images(copy):
    for path in copy.glob("*train*.array_record*"):
        path.unlink()
    data = Data(name="tfds", dir=str(copy), image_size=16)
    dataset = load_dataset(data, testing=True)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (0, 7, 3)
    with pytest.raises(ConfigError, match="is incomplete: 3 of 3 files are missing"):
        load_dataset(data)


def test_a_single_class_is_an_error(copy):
    (path,) = copy.glob("label.labels.txt")
    path.write_text("cat\n")
    with pytest.raises(ConfigError, match=r"data.dir: .*/set has a single class, cat: a network needs two classes or more$"):
        load_dataset(Data(name="tfds", dir=str(copy), image_size=16))


def test_a_set_is_prepared_from_a_folder_of_classes(folder, tmp_path, capsys):
    arguments = [str(shutil.copytree(folder / "train", tmp_path / "pets")), str(tmp_path / "out")]
    assert prepare.main(arguments) == 2
    assert f"folder of {arguments[0]}: --val-fraction 0.2\n" in capsys.readouterr().err
    assert prepare.main([*arguments, "--val-fraction", "0.2"]) == 0
    assert "0.2 of the images of each class are for testing (--val-fraction, by seed 0), 5 of 23" in capsys.readouterr().out
    for original, records in zip(open_folder(arguments[0], val_fraction=0.2)[:2], opened(tmp_path / "out"), strict=True):
        assert everything(records) == everything(original)


def test_a_file_that_is_missing_is_an_error(copy):
    next(copy.glob("*train*-00001-of-*")).unlink()
    with pytest.raises(ConfigError, match=r"is incomplete: 1 of 3 files are missing, such as .*00001-of-00003"):
        opened(copy)


def test_a_set_of_something_else_is_an_error(copy):
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)})
    features.save_config(copy)
    with pytest.raises(ConfigError, match=r"must have one image per record, found 0 among .*text: Text"):
        opened(copy)


def test_a_label_out_of_range_is_an_error(copy):
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2), "file_name": tfds.features.Text()}
    )
    (copy / "label.labels.txt").unlink()
    features.save_config(copy)
    train, _ = opened(copy)
    assert train.classes == ("0", "1")
    with pytest.raises(ConfigError, match=r"record 22 of train of .* has label 2, out of the range 0 to 1"):
        train.read(22)


def test_a_truncated_tfrecord_file_is_an_error(tfrecord, tmp_path):
    copy = shutil.copytree(tfrecord, tmp_path / "set")
    path = next(copy.glob("*train*-00000-of-*"))
    path.write_bytes(path.read_bytes()[:-7])
    train, _ = opened(copy)
    with pytest.raises(ConfigError, match=r"00000-of-00003 is damaged: expected 10 records, but they do not fill its \d+ bytes"):
        train.read(0)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 20000])
def test_a_damaged_array_record_file_is_named_and_its_images_are_unreadable(copy, content):
    next(copy.glob("*train*-00001-of-*")).write_bytes(content)
    source = load_dataset(Data(name="tfds", dir=str(copy), image_size=16, max_bad_images=9)).train
    image = np.empty((16, 16, 3), np.uint8)
    for index in range(len(source)):
        if 10 <= index < 19:
            with pytest.raises(UnreadableImageError):
                source.load(index, (index,), image)
        elif index != 19:
            source.load(index, (index,), image)
    message = (
        r"more than data.max_bad_images 9 .*: record 10 of train of .*\(images_pets_my_own-train.array_record-00001-of-00003\)"
    )
    with pytest.raises(ConfigError, match=message):
        source.load(19, (0,), image)


def test_a_damaged_record_is_unreadable(copy):
    """The file is whole, and TFDS cannot decode the record."""
    train, _ = opened(copy)
    with pytest.raises(UnreadableImageError):
        replace(train, serialized=[b"\xff nonsense"]).read(0)


def test_a_missing_package_is_named(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'scconv-jax\[train,tfds\]'"):
        opened(copy)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'scconv-jax\[train,tfds\]'"):
        prepare_folder("a", copy, workers=1)


def test_preparing_goes_on_where_it_was_stopped(folder, tmp_path):
    source, out = shutil.copytree(folder, tmp_path / "source"), tmp_path / "out"
    image = sorted((source / "train" / "dog").iterdir())[-1]
    data = image.read_bytes()
    image.unlink()
    image.mkdir()  # listed by name in the index of the time when it was a file
    image.rmdir()
    image.symlink_to("nowhere")
    with pytest.raises(
        ConfigError, match=r"No such file or directory.* Finished files are kept in .*/out.partial; the same command"
    ):
        prepare_folder(str(source), out, workers=1, shard=10)
    assert not out.exists()
    (first,) = (tmp_path / "out.partial").glob("*train*-00000-of-00003")
    before = first.stat()
    (tmp_path / "out.partial" / f"{first.name.replace('00000-of', '00001-of')}.unfinished").write_bytes(b"half")

    image.unlink()
    image.write_bytes(data)
    prepare_folder(str(source), out, workers=1, shard=10)
    (again,) = out.glob("*train*-00000-of-00003")
    assert (again.stat().st_ino, again.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "not written anew"
    assert not (tmp_path / "out.partial").exists()
    assert not list(out.glob("*.unfinished"))
    for original, records in zip(open_folder(str(source))[:2], opened(out), strict=True):
        assert everything(records) == everything(original)


KILLED = """
import os, signal, sys
from pathlib import Path
from train import prepare

read = prepare.FolderRecords.read

def read_and_die(self, index):
    if os.path.basename(self.root) == "train" and index == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)

prepare.FolderRecords.read = read_and_die
prepare.prepare_folder(sys.argv[1], Path(sys.argv[2]), workers=1, shard=10)
"""


def test_a_killed_preparation_goes_on_and_ends_in_the_same_files(folder, made, tmp_path):
    out = tmp_path / made.name
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    left = {path.name.rpartition("-train.")[2] for path in (tmp_path / f"{out.name}.partial").iterdir()}
    assert {"array_record-00000-of-00003", "array_record-00001-of-00003.unfinished"} <= left

    prepare_folder(str(folder), out, workers=3, shard=10)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in made.iterdir()}


def test_nothing_that_is_there_is_touched(folder, made, tmp_path, capsys):
    assert prepare.main([str(folder), str(made)]) == 2
    assert "exists already: choose another place, or remove it" in capsys.readouterr().err
    assert prepare.main([str(folder), "."]) == 2
    assert "error: . exists already" in capsys.readouterr().err
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    assert prepare.main([str(folder), str(tmp_path / "out")]) == 2
    assert "out.partial exists already, started with other images: remove it" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "mine").exists()


def test_two_preparations_of_one_place(folder, tmp_path, capsys, monkeypatch):
    """The second ends at once and touches nothing; the first goes on."""
    out, second = tmp_path / "out", []
    read = FolderRecords.read

    def read_and_try(self, index):
        if not second:
            second.append(None)
            second[0] = prepare.main([str(folder), str(out)]), capsys.readouterr().err, prepare.main(["--digits", str(out)])
        return read(self, index)

    monkeypatch.setattr(FolderRecords, "read", read_and_try)
    prepare_folder(str(folder), out, workers=1)
    code, error, digits = second[0]
    assert (code, digits) == (2, 2)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert error.endswith(f"error: {out}.partial is in use by {holder}: wait for it, or choose another OUT\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for original, records in zip(open_folder(str(folder))[:2], opened(out), strict=True):
        assert everything(records) == everything(original)


@pytest.mark.parametrize(
    "arguments",
    [["SRC", "gs://bucket/out"], ["gs://bucket/src", "OUT"], ["--digits", "~no-such-user/x"], ["SRC", os.fsdecode(b"caf\xe9")]],
)
def test_a_place_that_is_no_folder(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) == 2
    reasons = r"gs://bucket/\w+ is an address|~no-such-user/x: no home folder|the path '.*caf\\udce9' is not UTF-8"
    assert re.match(f"error: (SRC|OUT): ({reasons})", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_wrong_command_says_so(tmp_path, capsys):
    assert prepare.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "error: SRC must hold train/CLASS/IMAGE and val/CLASS/IMAGE" in capsys.readouterr().err
    for arguments in (["out"], ["source", "out", "--digits"], ["source", "out", "--workers", "0"]):
        with pytest.raises(SystemExit, match="2"):
            prepare.main(arguments)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b" space"])
def test_a_class_whose_name_a_set_cannot_keep_is_an_error(tmp_path, capsys, name):
    for split in ("train", "val"):
        for cls in (os.fsdecode(name), "cat"):
            path = tmp_path / split / cls / "x.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(path)
    assert prepare.main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SRC: a data set cannot keep the class name {os.fsdecode(name)!r}, only one line of UTF-8")
    assert not (tmp_path / "out.partial").exists()


def test_the_digits_as_files_are_the_digits(tmp_path, capsys):
    assert prepare.main(["--digits", str(tmp_path / "digits")]) == 0
    assert "--data.name folder" in capsys.readouterr().out
    files = load_dataset(Data(name="folder", dir=str(tmp_path / "digits"), resize=32))
    digits = load_dataset(Data(name="digits"))
    assert (len(files.train), len(files.test), files.classes) == (1437, 360, digits.classes)
    original = {name: [] for name in digits.classes}
    for image, label in zip(digits.test.images, digits.test.labels, strict=True):
        original[str(label)].append(image)
    for index, expected in enumerate(original["0"]):
        image = np.empty((32, 32, 3), np.uint8)
        assert files.test.load(index, (), image) == 0
        assert np.abs(image.astype(int) - expected).mean() < 3
    with pytest.raises(ConfigError, match="exists already"):
        prepare.write_digits(tmp_path / "digits")


def test_writing_the_digits_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        assert prepare.main(["--digits", str(tmp_path / "digits")]) == 130
    assert capsys.readouterr().err == "Stopped. The same command continues.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["digits.partial"]
    assert prepare.main(["--digits", str(tmp_path / "digits")]) == 0
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["train", "val"]


@pytest.mark.parametrize(
    "options", [{}, {"channels": 1}, {"image_size": 24, "resize": 24, "mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}]
)
def test_a_file_is_prepared_for_answers_as_in_the_test_of_the_run(folder, made, tmp_path, options):
    config = Config(data=Data(**{"name": "tfds", "dir": str(made), "image_size": 32, "batch_size": 4} | options))
    setup = make_setup(config)
    save_record(tmp_path, config, setup)
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["class_names"] == ["cat", "dog", "élan"]
    preparation = scconv_jax.images.Preparation(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in record["preparation"].items()}
    )
    _, records = open_tfds(str(made), "", "train", "")
    source = {records.read(i)[0]: i for i in range(len(records))}
    paths = sorted((folder / "val").rglob("*.*"))
    assert len(paths) == len(source) == 7
    for path in paths:
        expected = np.empty(setup.dataset.image_shape, np.uint8)
        setup.dataset.test.load(source[path.read_bytes()], (), expected)
        np.testing.assert_array_equal(scconv_jax.images.pixels(path, preparation), expected)
        ours = scconv_jax.prepare_images(path, preparation)
        np.testing.assert_array_equal(ours, jax.jit(setup.normalize)(expected[None]))
