import jax
import optax
import pytest

import scconv_jax
from tests.train.tiny import create_tiny
from train.config import Config, ConfigError, Data
from train.config.files import override
from train.config.flags import parse_flags
from train.setup import make_setup, make_step, make_test

CONFIG = Config(data=Data(name="synthetic", image_size=2, synthetic_train=80, synthetic_test=27))
"""The tiny network's maps of such images are one pixel."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(scconv_jax, "create_model", create_tiny)


@pytest.mark.parametrize(
    ("devices", "batch", "parts", "where", "cures"),
    [
        (1, 1, 1, "the device", 1),
        (4, 4, 1, "each of 4 devices", 2),
        (1, 8, 8, "the device in each of 8 parts (optim.accumulate)", 2),
        (8, 24, 3, "each of 8 devices in each of 3 parts (optim.accumulate)", 3),
    ],
)
def test_one_image_for_each_batchnorm_is_an_error_whose_cures_work(monkeypatch, devices, batch, parts, where, cures):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = override(CONFIG, {"data.batch_size": batch, "optim.accumulate": parts})
    with pytest.raises(ConfigError) as raised:
        make_setup(config)
    start, _, options = str(raised.value).partition(": use ")
    assert start == f"data.batch_size {batch} gives {where} one image, too few for the BatchNorm of scnet20_small at 2 × 2 pixels"
    options = options.split(" or ")
    assert len(options) == cures
    for option in options:
        make_setup(override(config, parse_flags(option.split()).given))
    make_setup(config, testing=True)
    make_setup(override(config, {"data.image_size": 3}))


def test_the_test_is_compiled_for_inference_and_the_step_is_not(monkeypatch):
    asked = []
    monkeypatch.setattr(scconv_jax, "inference_options", lambda platform: asked.append(platform) or {})
    config = override(CONFIG, {"data.batch_size": 16, "data.image_size": 8})
    setup = make_setup(config)
    make_step(setup, config, optax.identity())
    assert asked == []
    make_test(setup, config)
    assert asked == ["cpu"]
