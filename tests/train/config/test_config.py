import ast
import dataclasses
import functools
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from train.config import Augment, Config, ConfigError, Data, Hosts, Log, Model, Optim, make_plan
from train.config import schema as config_module
from train.config.files import CONFIGS, DEFAULT, differences, from_json, load_config, override, to_json
from train.config.flags import parse_flags
from train.data.datasets import load_dataset
from train.optim import make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Optim(learning_rate=0.1), "Optim has no field 'learning_rate'. Valid: "),
        (lambda: Optim(momentun=0.1), "Optim has no field 'momentun'. Did you mean 'momentum'?"),
        (lambda: Optim(lr="0.1"), "Optim.lr must be a finite number, found '0.1'"),
        (lambda: Optim(lr=True), "Optim.lr must be a finite number, found True"),
        (lambda: Optim(lr=0), "Optim.lr must be above 0, found 0"),
        (lambda: Optim(lr=float("nan")), "Optim.lr must be a finite number, found nan"),
        (
            lambda: Optim(schedule="cosin"),
            "Optim.schedule must be one of 'cosine', 'step', found 'cosin'. Did you mean 'cosine'?",
        ),
        (lambda: Optim(drop_epochs=[3.0]), "Optim.drop_epochs must be a tuple of float, found [3.0]"),
        (lambda: Optim(drop_epochs=(6.0, 3.0)), "Optim.drop_epochs must be in rising order, found (6.0, 3.0)"),
        (lambda: Log(profile_steps=(9, 3)), "Log.profile_steps must be two steps in rising order, found (9, 3)"),
        (lambda: Optim(ema=1.0), "Optim.ema must be at least 0 and under 1, found 1.0"),
        (lambda: Optim(accumulate=0), "Optim.accumulate must be at least 1, found 0"),
        (lambda: Optim(clip_norm=-1.0), "Optim.clip_norm must be at least 0, found -1.0"),
        (lambda: Augment(mixup=float("inf")), "Augment.mixup must be a finite number, found inf"),
        (lambda: Data(mean=(0.5, 0.5, float("nan"))), "Data.mean must be a tuple of float, found (0.5, 0.5, nan)"),
        (lambda: Augment(mixup=-0.1), "Augment.mixup must be at least 0, found -0.1"),
        (lambda: Data(name="digit"), "Data.name must be one of 'digits', 'synthetic', 'folder', "),
        (lambda: Data(resize=20), "Data.resize must be 0 or at least image_size 32, found 20"),
        (
            lambda: Data(crop_scale=(0.5, 1.5)),
            "Data.crop_scale must be two numbers above 0, the second not less than the first, at",
        ),
        (
            lambda: Data(crop_ratio=(2.0, 1.0)),
            "Data.crop_ratio must be two numbers above 0, the second not less than the first, f",
        ),
        (lambda: Data(mean=(0.5,)), "Data.mean must be three numbers, for red, green and blue, found (0.5,)"),
        (lambda: Data(std=(0.5, 0.5, 0.0)), "Data.std must be above 0, found (0.5, 0.5, 0.0)"),
        (lambda: Data(max_bad_images=-1), "Data.max_bad_images must be at least 0, found -1"),
        (lambda: Data(batch_size=0), "Data.batch_size must be at least 1, found 0"),
        (lambda: Data(batch_size=6.5), "Data.batch_size must be a whole number, found 6.5"),
        (lambda: Data(flip=1), "Data.flip must be True or False, found 1"),
        (lambda: Model(name=3), "Model.name must be text, found 3"),
        (lambda: Hosts(count=2.5), "Hosts.count must be a whole number or None, found 2.5"),
        (
            lambda: Hosts(count=2, index=1),
            "Hosts.address is missing: count, index and address go together; found count=2, index=1",
        ),
        (lambda: Hosts(count=2, index=2, address="a:1"), "Hosts.index must be 0 to 1, found 2"),
        (lambda: Hosts(count=2, index=0, address="a"), "Hosts.address must be HOST:PORT, port 1 to 65534, found 'a'"),
        (lambda: Hosts(timeout=0), "Hosts.timeout must be above 0 (seconds), found 0"),
        (lambda: Config(model="scnet50"), "Config.model must be a Model(...), found 'scnet50'"),
        (lambda: Config(epochs=0), "Config.epochs must be at least 1, found 0"),
        (lambda: Config(epochs=2, optim=Optim(warmup_epochs=2)), "Config.epochs must be more than Optim.warmup_epochs, found 2"),
    ],
)
def test_a_mistake_is_named(build, message):
    with pytest.raises(ConfigError) as raised:
        build()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is(path):
    """A header with command, hardware, time and result, or "not measured"."""
    assert isinstance(load_config(path), Config)
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert header, "no header"
    for word in ("Command", "Hardware", "Time", "Result"):
        assert f"\n{word}" in header, f"the header has no line {word}"


TRAINING_IMAGES = {"digits": 1437, "synthetic": 128, "folder": 1_281_167}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_has_a_network_a_plan_and_a_step(path):
    """The network takes images of that size; epochs become steps on 1 and 8 devices; the optimizer takes the parameters."""
    config = load_config(path)
    images = jax.ShapeDtypeStruct((2, config.data.image_size, config.data.image_size, 3), jnp.float32)
    model = scconv_jax.create_model(config.model.name, dtype=jnp.dtype(config.model.dtype))
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    for devices in (1, 8):
        plan = make_plan(config, TRAINING_IMAGES[config.data.name], devices)
        assert 0 <= plan.warmup_steps < plan.total_steps
        schedule = make_schedule(config.optim, plan)
        assert schedule(plan.total_steps - 1) < 0.1 * plan.peak_lr, "the rate falls"
    optimizer = make_optimizer(config.optim, schedule)
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), variables["params"])
    assert jax.tree.structure(updates) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize(
    ("name", "epoch_and_rate"),
    [
        ("scnet50", {0: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 99: 0.0001}),
        ("scconv_resnet50", {0: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001}),
        ("cifar", {0: 0.05, 99: 0.05, 100: 0.005, 150: 0.0005}),
        ("scnet50_v1d", {0: 0.0, 2.5: 0.2, 5: 0.4, 62.5: 0.2}),
    ],
)
def test_recipes_have_the_learning_rates_of_their_sources(name, epoch_and_rate):
    config = load_config(CONFIGS / f"{name}.py")
    plan = make_plan(config, 100 * config.data.batch_size, devices=1)
    schedule = make_schedule(config.optim, plan)
    for epoch, rate in epoch_and_rate.items():
        assert float(schedule(int(epoch * 100))) == pytest.approx(rate, rel=1e-4), f"epoch {epoch}"


def test_cifar_images_are_taken_whole(tmp_path):
    """By the cropping of image files, no pixel is lost or resampled; the crop after padding comes later."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for label, image in enumerate(pixels):
            (tmp_path / split / f"class{label}").mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / split / f"class{label}" / "0.png")
    config = load_config(CONFIGS / "cifar.py")
    dataset = load_dataset(dataclasses.replace(config.data, dir=str(tmp_path)))
    for source in (dataset.train, dataset.test):
        for label, image in enumerate(pixels):
            found = np.empty(source.image_shape, np.uint8)
            found_label = source.load(label, (0, 0, label), found)
            assert found_label == label
            np.testing.assert_array_equal(found, image)


def test_the_default_is_the_digits():
    assert DEFAULT == CONFIGS / "digits.py"
    config = load_config(DEFAULT)
    assert (config.model.name, config.data.name, config.data.flip) == ("scnet20_small", "digits", False)


def test_every_field_says_what_it_is():
    """`--help` shows the string that follows a field."""
    tree = ast.parse(Path(config_module.__file__).read_text())
    groups = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = typing.get_type_hints(Config)
    for group in (Config, Hosts, *(part for part in parts.values() if dataclasses.is_dataclass(part))):
        body = groups[group.__name__].body
        for name in [field.name for field in dataclasses.fields(group) if not dataclasses.is_dataclass(parts.get(field.name))]:
            at = next(i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign) and node.target.id == name)
            follows = body[at + 1]
            assert isinstance(follows, ast.Expr), f"{group.__name__}.{name} has no description"
            assert isinstance(follows.value, ast.Constant)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import train.config\n", "must define `config = Config(...)`, found NoneType"),
        ("config = 3\n", "must define `config = Config(...)`, found int"),
        ("from train.config import Config\n\nconfig = Config(epoch=3)\n", "Config has no field 'epoch'. Did you mean 'epochs'"),
        ("from train.config import Config\n\nconfig = Config(\n", "line 3: SyntaxError: "),
        ("\nimport trian\n", "line 2: ModuleNotFoundError: No module named 'trian'"),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_config_files_of_any_editor(tmp_path, start, end):
    path = tmp_path / "mine.py"
    path.write_bytes(
        start + end.join([b"from train.config import Config", b"config = Config(", b"    epochs=3,  # caf\xc3\xa9", b")"])
    )
    config = load_config(path)
    assert config.epochs == 3
    assert from_json(start + to_json(config).encode().replace(b"\n", end), "config.json") == config


def test_a_config_file_that_is_not_utf_8(tmp_path):
    (tmp_path / "mine.py").write_bytes("config = 3".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"mine.py is not text in UTF-8, perhaps in UTF-16: save it as UTF-8$"):
        load_config(tmp_path / "mine.py")


def test_a_config_file_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"^no config file configs/digit.py; there is configs/digits.py$"):
        load_config(Path("configs/digit.py"))
    (tmp_path / "mine.py").touch()
    with pytest.raises(ConfigError, match=r"no config file .*/mime.py; there is .*/mine.py$"):
        load_config(tmp_path / "mime.py")


def test_json_brings_back_the_same_config():
    config = Config(epochs=7, optim=Optim(drop_epochs=(1.5, 3.0), schedule="step"), model=Model(sync_batchnorm=True))
    assert from_json(to_json(config), "config.json") == config


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": 3, "models": {}}', '{"model": 3}', '{"epochs": null}'])
def test_json_that_is_no_config(text):
    with pytest.raises(ConfigError, match=r"^runs/x/config.json is not the config of a run: "):
        from_json(text, "runs/x/config.json")


def test_differences_are_named_by_field():
    old, new = Config(), Config(seed=3, optim=Optim(lr=0.3))
    assert differences(old, new) == {"seed": (0, 3), "optim.lr": (0.1, 0.3)}


def test_a_plan_counts_whole_batches():
    config = Config(epochs=3, data=Data(batch_size=64), optim=Optim(warmup_epochs=0.5, drop_epochs=(1.0, 2.5)))
    plan = make_plan(config, train_images=1437, devices=8)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps, plan.drop_steps) == (22, 66, 11, (22, 55))


@pytest.mark.parametrize(
    ("batch_size", "devices", "message"),
    [
        (60, 8, "data.batch_size 60 does not divide over 8 devices: use 56 or 64"),
        (3, 8, "data.batch_size 3 does not divide over 8 devices: use 8"),
        (
            128,
            8,
            "data.batch_size 128 is more than the 100 training images of the data set: "
            "use --data.batch-size 16 --optim.lr 0.013 --epochs 90",
        ),
        (
            128,
            64,
            "data.batch_size 128 is more than the 100 training images of the data set: with these devices and options, a "
            "batch has at least 128; use more images, fewer devices or fewer parts",
        ),
    ],
)
def test_a_batch_that_does_not_fit(batch_size, devices, message):
    with pytest.raises(ConfigError) as raised:
        make_plan(Config(data=Data(batch_size=batch_size)), train_images=100, devices=devices)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("images", [5, 17, 50, 100, 255])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("path", [CONFIGS / "scnet50.py", CONFIGS / "finetune.py"], ids=lambda path: path.stem)
def test_the_recipe_for_few_images_works(path, images, devices):
    """Hundreds of steps, several an epoch, and a peak learning rate in proportion to the batch."""
    config = override(load_config(path), {"data.batch_size": 256, "optim.lr": 0.1})
    with pytest.raises(ConfigError, match=f"is more than the {images} training images") as raised:
        make_plan(config, images, devices)
    recipe = parse_flags(["--config", str(path), *str(raised.value).partition(": use ")[2].split()])
    config = override(config, recipe.given)
    plan = make_plan(config, images, devices)
    assert plan.steps_per_epoch >= (1 if images == 5 and devices == 2 else 2)
    assert plan.total_steps >= 400
    assert plan.peak_lr == pytest.approx(0.1 * config.data.batch_size / 256, rel=0.05)
    assert config.optim.schedule == ("cosine" if config.epochs > load_config(path).epochs else load_config(path).optim.schedule)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(data=Data(batch_size=40), optim=Optim(accumulate=3)),
            "data.batch_size 40 does not divide over 4 devices, each in 3 parts (optim.accumulate): use 36 or 48",
        ),
        (
            Config(data=Data(batch_size=20), augment=Augment(mixup=0.2)),
            "data.batch_size 20 does not divide over 4 devices, in pairs (augment.mixup, augment.cutmix): use 16 or 24",
        ),
    ],
)
def test_a_share_that_does_not_divide(config, message):
    with pytest.raises(ConfigError) as raised:
        make_plan(config, train_images=100, devices=4)
    assert str(raised.value).startswith(message)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        typing.cast("typing.Any", Config()).epochs = 3
