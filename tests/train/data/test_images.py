import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import scconv_jax
from scconv_jax.images import ImageError, Preparation, decode
from tests.image_files import broken, encoded, modes, photo, subsampled, turned
from train.config import Data
from train.data.batches import eval_batches
from train.data.datasets import load_dataset
from train.data.images import crop_box, random_resized_crop
from train.parallel import make_parallel
from train.step import TrainState, eval_step


def whole(data, size, **options):
    """Return the whole image, resized as in training."""
    return random_resized_crop(data, size, np.random.default_rng(0), scale=(1, 1), ratio=(1e-9, 1e9), **options)


@pytest.mark.parametrize(("data", "color"), [pytest.param(data, color, id=name) for name, data, color in modes()])
def test_every_kind_of_image_has_its_colours(data, color):
    for pixels in (whole(data, 16), whole(data, 16, exif=True)):
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels.astype(int) - color).max() <= 3


def test_the_orientation_is_ignored_as_torchvision_does_and_followed_on_request():
    for data in (turned(1), turned(3), turned(6)):
        plain = whole(data, 32)
        assert plain[0].mean() < 20 < 235 < plain[-1].mean()
    assert whole(turned(1), 32, exif=True)[0].mean() < 20
    upside_down = whole(turned(3), 32, exif=True)
    assert upside_down[0].mean() > 235 > 20 > upside_down[-1].mean()
    on_its_side = whole(turned(6), 32, exif=True)
    assert on_its_side[:, 0].mean() > 235 > 20 > on_its_side[:, -1].mean()


@pytest.mark.parametrize(("data", "reason"), [pytest.param(data, reason, id=name) for name, data, reason in broken()])
def test_what_cannot_be_read_says_why(data, reason):
    for exif in (False, True):
        with pytest.raises(ImageError, match=reason):
            whole(data, 16, exif=exif)


@pytest.mark.parametrize(
    "factors",
    [(luma, 0x11, 0x11) for luma in (0x11, 0x21, 0x22, 0x12, 0x41, 0x14, 0x24, 0x31)] + [(0x11, 0x22, 0x22), (0x22, 0x12, 0x21)],
    ids=lambda factors: "".join(f"{factor:x}" for factor in factors),
)
def test_every_kind_of_subsampling_is_read(factors):
    assert (whole(subsampled(factors), 16) == 128).all()


def test_a_line_of_pixels_can_be_trained_on():
    assert (whole(encoded(Image.new("L", (60_000, 1), 77), "PNG"), 32) == 77).all()


def test_a_truncated_file_is_found_whichever_part_is_asked_for():
    """Small crops are not decoded that far."""
    data = encoded(photo(300, 200))[:-200]
    for key in range(10):
        with pytest.raises(ImageError, match="truncated"):
            random_resized_crop(data, 32, np.random.default_rng(key), scale=(0.05, 0.1))


def test_a_crop_is_decided_by_its_key_alone():
    data = encoded(photo(200, 300))
    first, again, other = (random_resized_crop(data, 32, np.random.default_rng(key)) for key in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("height", "width"), [(80, 90), (100, 120), (330, 500), (1030, 900)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_pixels_are_near_those_of_an_antialiased_resize(height, width, kind):
    """For the same box, at every factor of scaled decoding, and also if the image is enlarged."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:height, :width] * 2 * np.pi / min(height, width)
    smooth = 128 + 60 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    data = encoded(smooth.astype(np.uint8), kind, **({"quality": 97} if kind == "JPEG" else {}))
    for _ in range(5):
        state = rng.bit_generator.state
        found = random_resized_crop(data, 64, rng)
        rng.bit_generator.state = state
        top, left, h, w = crop_box(height, width, rng, (0.08, 1), (3 / 4, 4 / 3))
        box = (left, top, left + w, top + h)
        expected = np.asarray(decode(data).resize((64, 64), Image.Resampling.BILINEAR, box=box))
        assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize(("height", "width"), [(211, 300), (1031, 900)])
def test_leaving_out_the_rows_below_a_crop_changes_no_pixel(height, width, options):
    """All rows are decoded of a file with a byte after its end."""
    rng = np.random.default_rng(2)
    for quality in (50, 95):
        data = encoded(photo(height, width), quality=quality, **options)
        for _ in range(8):
            key = int(rng.integers(2**32))
            found, expected = (random_resized_crop(d, 64, np.random.default_rng(key)) for d in (data, data + b"\0"))
            np.testing.assert_array_equal(found, expected)


def test_boxes_have_the_distribution_of_torchvision():
    """Area and position are uniform, the ratio log-uniform: moments of 4,000 boxes that all fit in a square."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(1000, 1000, rng, (0.1, 0.5), (0.8, 1.25)) for _ in range(4000)], float)
    top, left, height, width = boxes.T
    area, ratio = height * width / 1e6, np.log(width / height)
    assert abs(area.mean() - 0.3) < 0.006
    assert abs(area.std() - 0.4 / 12**0.5) < 0.004
    assert abs(ratio.mean()) < 0.006
    assert abs(ratio.std() - 2 * np.log(1.25) / 12**0.5) < 0.004
    assert abs((top / (1000 - height)).mean() - 0.5) < 0.015
    assert abs((left / (1000 - width)).mean() - 0.5) < 0.015
    assert (boxes >= 0).all()
    assert ((top + height) <= 1000).all()
    assert ((left + width) <= 1000).all()


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (100, 100, (0, 0, 100, 100))],
)
def test_where_no_box_fits_the_largest_central_one_is_taken(height, width, box):
    assert crop_box(height, width, np.random.default_rng(0), (2, 3), (3 / 4, 4 / 3)) == box


def test_no_warning_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, data, _ in modes():
            whole(data, 16)


def in_the_test_step(images, dataset, devices):
    """Return the float images that the network receives in the compiled test step."""
    received = []

    class Network(nn.Module):
        """Keeps its input and has ten classes."""

        @nn.compact
        def __call__(self, x, *, train):
            assert not train
            jax.debug.callback(lambda x: received.append(np.asarray(x)), x)
            return nn.Conv(10, (3, 3))(nn.relu(x)).mean((1, 2))

    model = Network()
    variables = model.init(jax.random.key(0), jnp.zeros((1, *dataset.image_shape)), train=False)
    state = TrainState(step=jnp.int32(0), params=variables["params"], batch_stats={}, opt_state=())
    normalize = functools.partial(scconv_jax.images.normalize, mean=dataset.mean, std=dataset.std)
    parallel = make_parallel("shard_map", devices)
    step = parallel.over_devices(functools.partial(eval_step, model=model, normalize=normalize))
    received.clear()
    jax.block_until_ready(step(parallel.put_state(state), parallel.put_batch(images)))
    jax.effects_barrier()
    assert len(received) == len(devices)
    return received


def test_prepared_images_are_those_of_the_test_step_bit_for_bit(tmp_path, monkeypatch):
    """Every value of every channel occurs; portrait, landscape, a PNG, a small image."""
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path / "cache"))
    levels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    every = np.stack([np.roll(np.arange(1024) % 256, 85 * channel) for channel in range(3)], axis=-1).reshape(32, 32, 3)
    pictures = [photo(90, 61), photo(61, 90), levels, every.astype(np.uint8), photo(20, 30), photo(34, 34)]
    for split in ("train", "val"):
        for number, picture in enumerate(pictures):
            kind, folder = "JPEG" if number < 2 else "PNG", tmp_path / split / "ab"[number // 3]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.{kind.lower()}").write_bytes(encoded(picture, kind))
    files = sorted(tmp_path.glob("val/*/*"))
    dataset = load_dataset(Data(name="folder", dir=str(tmp_path), image_size=32, resize=32))
    (batch,) = eval_batches(dataset.test, len(files), threads=2)
    prepared = scconv_jax.prepare_images(files, Preparation(32, 32))
    assert prepared.dtype == np.float32
    for channel in range(3):
        assert len(np.unique(prepared[..., channel])) == 256
    (received,) = in_the_test_step(batch, dataset, jax.devices()[:1])
    np.testing.assert_array_equal(prepared.view(np.uint32), received.view(np.uint32))


def test_loss_of_prepared_images_is_that_of_the_test_step():
    """Nothing watches the images here, so XLA may fuse their normalisation with the network's first convolution."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32)
    preparation = Preparation(32, 32)
    model = scconv_jax.create_model("scnet20_small")
    state = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: rng.uniform(0.01, 0.1, leaf.shape).astype(np.float32), state)
    state = TrainState(step=jnp.int32(0), params=variables["params"], batch_stats=variables["batch_stats"], opt_state=())
    parallel = make_parallel("shard_map", jax.devices()[:1])
    normalize = functools.partial(scconv_jax.images.normalize, mean=preparation.mean, std=preparation.std)
    sums = []
    for function, pixels in ((normalize, images), (lambda x: x, scconv_jax.prepare_images(images, preparation))):
        step = parallel.over_devices(functools.partial(eval_step, model=model, normalize=function))
        batch = {"image": pixels, "label": labels, "weight": np.ones(4, np.float32)}
        sums.append(jax.device_get(step(parallel.put_state(state), parallel.put_batch(batch))))
    assert sums[0] == sums[1]
