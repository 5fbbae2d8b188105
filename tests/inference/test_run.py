"""A trained network with the names of its classes and the preparation of its images: from a run, a file, a name."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import scconv_jax
from scconv_jax.cli import main
from scconv_jax.images import Preparation, pixels
from scconv_jax.inference import imagenet
from scconv_jax.interop.recognition import template
from tests.image_files import encoded
from tests.image_files import photo as random_photo
from tests.inference.conftest import NAMES, PREPARATION, made
from train.config import Config, Data
from train.config.files import to_json
from train.run.checkpoints import Checkpoints
from train.setup import make_setup, save_record
from train.step import init_state


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(random_photo(50, 70)))
    return path


def copied(run, folder, without=()):
    """The folder of a run, with the same checkpoints, but without some of its other files."""
    folder.mkdir()
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    for name in {"config.json", "model.json"} - set(without):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


def test_a_run_knows_its_classes_and_its_images(run, photo):
    trained = scconv_jax.load_run(run)
    assert (trained.name, trained.options["num_classes"]) == ("scnet20_small", 3)
    assert trained.class_names == NAMES
    assert trained.readable_names == ("cat", "<b>dog</b>", "tench")
    assert trained.preparation == PREPARATION
    np.testing.assert_array_equal(trained.prepare(photo), scconv_jax.prepare_images(photo, PREPARATION))
    [answers] = trained.predict(photo)
    logits = trained.model.apply(trained.variables, jnp.asarray(trained.prepare(photo)), train=False)
    expected = np.asarray(jax.nn.softmax(logits))[0]
    assert [answer.label for answer in answers] == np.argsort(-expected).tolist()
    # 1e-5: the network is compiled here and not there.
    np.testing.assert_allclose([answer.probability for answer in answers], np.sort(expected)[::-1], rtol=1e-5)
    assert {answer.label: answer.name for answer in answers} == dict(enumerate(trained.readable_names))


@pytest.mark.parametrize(
    ("checkpoint", "step", "said"),
    [
        ("best", 5, "The best checkpoint, of step 5, was taken. The latest is {}/checkpoints/10."),
        ("latest", 10, "The latest checkpoint, of step 10, was taken. The best is {}/checkpoints/5."),
        (10, 10, "The latest checkpoint, of step 10, was taken. The best is {}/checkpoints/5."),
        ("5", 5, "The best checkpoint, of step 5, was taken. The latest is {}/checkpoints/10."),
    ],
)
def test_which_checkpoint_is_one_rule_and_said(run, caplog, checkpoint, step, said):
    with caplog.at_level(logging.WARNING, "scconv_jax"):
        trained = scconv_jax.load_run(run, checkpoint=checkpoint)
    assert caplog.messages == [f"pets: {said.format(run)}"]
    expected = scconv_jax.load(run / "checkpoints" / str(step)).variables
    for found in (
        trained.variables,
        scconv_jax.load(run, checkpoint=checkpoint).variables,
        scconv_jax.load_model(run, checkpoint=checkpoint)[1],
        scconv_jax.load_weights(run, expected, checkpoint=checkpoint)[0],
    ):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("inside", "checkpoint", "message"),
    [
        ("", 7, "it has no checkpoint of step 7, but of step 5, 10"),
        ("", "last", "checkpoint 'last' is neither best, nor latest, nor a step"),
        ("checkpoints/5", "latest", "it is one checkpoint, so there is no checkpoint 'latest' to choose; give the run's folder"),
        ("model.json", "latest", "it is not the folder of a training run, so there is no checkpoint 'latest' to choose"),
    ],
)
def test_a_checkpoint_that_cannot_be_chosen(run, inside, checkpoint, message):
    with pytest.raises(scconv_jax.WeightsError, match=message):
        scconv_jax.load_run(run / inside, checkpoint=checkpoint)


def test_names_and_preparation_are_in_every_file_from_a_run(run, tmp_path):
    assert main(["convert", str(run), "--out", str(tmp_path / "a.safetensors"), "--checkpoint", "latest"]) == 0
    assert main(["convert", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.safetensors")]) == 0
    variables, metadata = scconv_jax.load(run)
    scconv_jax.save(tmp_path / "c.safetensors", variables, metadata)
    for name in "abc":
        trained = scconv_jax.load_run(tmp_path / f"{name}.safetensors")
        assert (trained.name, trained.class_names, trained.preparation, trained.notes) == (
            "scnet20_small",
            NAMES,
            PREPARATION,
            (),
        )
    assert metadata["class_names"] == list(NAMES)
    assert metadata["preparation"]["resize"] == 35
    assert scconv_jax.load(tmp_path / "b.safetensors").metadata["arguments"]["num_classes"] == 3
    assert main(["convert", str(run), "--out", str(tmp_path / "d.safetensors"), "--num-classes", "4"]) == 0
    other = scconv_jax.load_run(tmp_path / "d.safetensors")
    assert (other.class_names, other.preparation) == (None, PREPARATION), "a new head has other classes"
    assert "class_names" not in scconv_jax.load(tmp_path / "d.safetensors").metadata


def test_an_old_run_has_numbered_classes_and_says_so(run, tmp_path, photo):
    old = copied(run, tmp_path / "old run", without=["model.json"])
    trained = scconv_jax.load_run(old)
    assert trained.class_names is None
    assert trained.readable_names == ("0", "1", "2")
    assert {answer.name for answer in trained.predict(photo)[0]} == {"0", "1", "2"}
    assert trained.notes[1:] == (
        "The names of its 3 classes are not recorded, so they are numbered.",
        "The mean and standard deviation of its images are not recorded: ImageNet's are assumed. Resuming the run records them: "
        f"python -m train.main --workdir '{old}' --resume",
    )
    assert (trained.preparation.size, trained.preparation.resize) == (32, 32), "digits are not cropped"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Data(name="folder", image_size=64, exif=True), Preparation(64, 73, exif=True)),
        (Data(name="tfds", image_size=32, resize=40, mean=(0.1, 0.2, 0.3)), Preparation(32, 40, mean=(0.1, 0.2, 0.3))),
        (Data(name="digits", image_size=40, mean=(0.3,) * 3, std=(0.4,) * 3), Preparation(40, 40, (0.3,) * 3, (0.4,) * 3)),
    ],
)
def test_the_config_of_an_old_run_says_how_images_are_prepared(run, tmp_path, data, expected):
    old = copied(run, tmp_path / "old", without=["model.json", "config.json"])
    (old / "config.json").write_text(to_json(Config(data=data)))
    assert scconv_jax.load_run(old).preparation == expected


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["a", "b"], "It has names of 2 classes, but the network has 3, so the classes are numbered."),
        ("abc", "Its names of classes are not a list of texts, so the classes are numbered."),
        ([1, 2, 3], "Its names of classes are not a list of texts, so the classes are numbered."),
    ],
)
def test_names_that_do_not_fit_are_not_used(run, tmp_path, names, note):
    other = copied(run, tmp_path / "other", without=["model.json"])
    record = json.loads((run / "model.json").read_text()) | {"class_names": names}
    (other / "model.json").write_text(json.dumps(record))
    trained = scconv_jax.load_run(other)
    assert trained.class_names is None
    assert note in trained.notes


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0}, {"size": "32"}, {"size": 40}, {"size": 10**6, "resize": 10**6}, {"mean": [0.5]}, {"mean": ["a", 1, 1]},
        {"std": [0, 1, 1]}, {"std": [float("nan"), 1, 1]}, {"mean": [0.5], "std": [0.5]}, {"mean": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_preparation_that_is_nonsense_is_an_error(run, tmp_path, wrong):
    other = copied(run, tmp_path / "other", without=["model.json"])
    record = json.loads((run / "model.json").read_text())
    record["preparation"] |= wrong
    (other / "model.json").write_text(json.dumps(record))
    with pytest.raises(scconv_jax.WeightsError, match="does not say properly how its images are prepared"):
        scconv_jax.load_run(other)


def test_a_damaged_record_is_as_good_as_none(run, tmp_path):
    other = copied(run, tmp_path / "other")
    for text in ("{", "[]", "null", "[" * 100_000):
        (other / "model.json").write_text(text)
        assert scconv_jax.load_run(other).class_names is None
    (other / "model.json").write_text(json.dumps({"model": "scnet20_small", "arguments": [1]}))
    with pytest.raises(scconv_jax.WeightsError, match="arguments in its metadata are not a JSON object"):
        scconv_jax.load_run(other)


def test_the_checkpoints_of_an_older_run_name_its_classes(run, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    state = scconv_jax.load(run).variables
    with Checkpoints(old, keep=1, classes=["a", "b", "c"]) as checkpoints:
        model = scconv_jax.create_model("scnet20_small", num_classes=3)
        start = jax.eval_shape(lambda: init_state(model, optax.identity(), (32, 32, 3), seed=0))
        checkpoints.save(start.replace(step=jnp.int32(1), **state), {"eval/top1": 0.5})
    assert scconv_jax.load_run(old).class_names == ("a", "b", "c")


def test_a_file_of_a_thousand_classes_is_of_imagenet(tmp_path, caplog):
    variables = made(template(scconv_jax.create_model("ghostnet_100")))
    scconv_jax.save(tmp_path / "mine.pth", variables)
    trained = scconv_jax.load_run(tmp_path / "mine.pth")
    assert trained.class_names is not None
    assert trained.class_names[:2] == ("tench", "goldfish")
    assert trained.preparation == scconv_jax.model_info("ghostnet_100").preparation
    assert "mine.pth: It does not say what its 1,000 classes are: ImageNet's are assumed." in caplog.messages
    assert any("resize 256, crop 224" in message for message in caplog.messages)


def test_published_weights_leave_nothing_to_assume(tmp_path):
    published = scconv_jax.model_info("scnet50").weights
    assert published
    shapes = template(scconv_jax.create_model("scnet50"))
    path = tmp_path / published.rpartition("/")[2]
    scconv_jax.save(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    trained = scconv_jax.load_run(path)
    assert trained.readable_names[207] == "golden retriever"
    assert trained.notes == ()


@pytest.mark.parametrize("metadata", [{"model": "scnet20_small", "arguments": {"num_classes": 0}}, {}])
def test_a_network_without_head_has_no_answers(run, tmp_path, capsys, metadata):
    _, variables = scconv_jax.load_model(run, num_classes=0)
    path = tmp_path / "features.safetensors"
    scconv_jax.save(path, variables, metadata)
    for command, images, out in (("predict", [__file__], "x.csv"), ("explain", [__file__], "x"), ("export", [], "x.onnx")):
        assert main([command, *images, "--weights", str(path), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert f"{path} is scnet20_small without its head (fc), so it knows no classes." in error
    assert [file.name for file in tmp_path.iterdir()] == ["features.safetensors"]


def test_the_classes_of_imagenet():
    names = imagenet.synsets()
    assert len(names) == len(set(names.values())) == 1000
    assert list(names) == sorted(names)
    assert (names["n02012849"], names["n03126707"]) == ("crane (bird)", "crane (machine)")
    assert [list(names).index(synset) for synset in ("n01440764", "n02123045", "n15075141")] == [0, 281, 999]
    assert imagenet.imagenet_name("n02123045") == "tabby"
    assert imagenet.imagenet_name("pets") == "pets"


def load_test_image(source, index):
    out = np.empty(source.image_shape, np.uint8)
    source.load(index, (), out)
    return out


@pytest.fixture
def recorded(tmp_path):
    """Returns (data) → the trainer's set-up, and the preparation that a run of it records."""

    def record(data):
        config = Config(data=data)
        setup = make_setup(config)
        save_record(tmp_path, config, setup)
        found = json.loads((tmp_path / "model.json").read_text())
        assert found["class_names"] == list(setup.dataset.classes)
        assert found["arguments"] == {"num_classes": len(setup.dataset.classes), "in_channels": data.channels}
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in found["preparation"].items()}
        return setup, Preparation(**fields)

    return record


@pytest.mark.parametrize(
    "data",
    [
        Data(name="digits", image_size=32),
        Data(name="digits", image_size=28, channels=1),
        Data(name="synthetic", image_size=40, synthetic_train=64, synthetic_test=8),
    ],
    ids=["digits", "grey digits", "synthetic"],
)
def test_an_image_of_the_trainers_test_is_prepared_as_in_it(recorded, tmp_path, data):
    setup, preparation = recorded(data)
    for index in range(8):
        expected = load_test_image(setup.dataset.test, index)
        Image.fromarray(expected.squeeze()).save(tmp_path / "image.png")
        np.testing.assert_array_equal(pixels(tmp_path / "image.png", preparation), expected)
        ours = scconv_jax.prepare_images(tmp_path / "image.png", preparation)
        np.testing.assert_array_equal(ours, jax.jit(setup.normalize)(expected[None]))


def test_a_scan_of_a_digit_is_enlarged_as_in_the_trainers_test(recorded):
    """A file has 256 levels and a scan 17, and PIL rounds after each axis: one level of 255 differs at most."""
    from sklearn import datasets, model_selection

    setup, preparation = recorded(Data(name="digits", image_size=32))
    scans = datasets.load_digits().images
    _, test = model_selection.train_test_split(
        np.arange(1797), test_size=360, stratify=datasets.load_digits().target, random_state=0
    )
    for index in range(50):
        scan = Image.fromarray(np.round(255 / 16 * scans[test[index]]).astype(np.uint8))
        expected = load_test_image(setup.dataset.test, index)
        assert np.abs(pixels(scan, preparation).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "options",
    [{}, {"channels": 1}, {"exif": True}, {"resize": 40, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}],
    ids=["colours", "grey", "exif", "other numbers"],
)
def test_files_are_prepared_as_in_the_trainers_test(recorded, tmp_path, options):
    turned, paths = Image.Exif(), []
    turned[0x0112] = 6
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number, size in enumerate(((60, 90), (33, 32), (91, 47))):
                exif = {"exif": turned} if number == 0 else {}
                (folder / f"{number}.jpg").write_bytes(encoded(random_photo(*size, seed=number), **exif))
                paths += [folder / f"{number}.jpg"] if split == "val" else []
    setup, preparation = recorded(Data(name="folder", dir=str(tmp_path / "images"), image_size=32, batch_size=2, **options))
    for index, path in enumerate(paths):
        expected = load_test_image(setup.dataset.test, index)
        np.testing.assert_array_equal(pixels(path, preparation), expected)
        ours = scconv_jax.prepare_images(path, preparation)
        np.testing.assert_array_equal(ours, jax.jit(setup.normalize)(expected[None]))
