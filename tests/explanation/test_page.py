"""The page of `explain`, as Chromium shows it, made of arrays without a network."""

import dataclasses

import numpy as np
import pytest

import scconv_jax
from scconv_jax.explanation import Explained, Separation
from scconv_jax.explanation.explained import extent
from scconv_jax.explanation.page import label, page
from scconv_jax.explanation.pictures import coloured, quantized, sheet
from scconv_jax.explanation.report import PAGE, build, write
from tests.browser import PHONE, assert_fits

HOSTILE = "</script><script>window.broken = 1</script>"
FILES = ["<img src=x onerror='window.broken = 2'>.png", '../../two & "three".png', "三.png"]
CLASSES = ("cat", HOSTILE, "../../etc", "dog\u202e" + 100 * "o")


def explained(name="scnet20_small", *, gates=True, units=True):
    random = np.random.default_rng(0)
    model = scconv_jax.create_model(name, num_classes=4)
    preparation = scconv_jax.images.Preparation(16, 16)
    trained = scconv_jax.TrainedModel(model, {}, name, {}, CLASSES, preparation)
    maps = random.random((3, 8, 8, 10), np.float32)
    betas = np.exp(random.random((3, 2, 10), np.float32))
    return Explained(
        trained,
        random.integers(0, 255, (3, 16, 16, 3), np.uint8),
        np.array([[0.1, 0.6, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]], np.float32),
        np.array([[1, 2, 0], [0, 1, 2], [3, 1, 2]]),
        {"layer1": random.random((3, 3, 16, 16), np.float32), "layer2": random.random((3, 3, 4, 4), np.float32)},
        {"layer1": np.eye(16, dtype=np.float32), "layer2": np.ones((16, 16), np.float32)},
        {f"layer{i}/0/scconv": maps[:, ::i, ::i] for i in (1, 2)} if gates else {},
        {"layer1/0/conv2/SRU": Separation(maps, 1 - maps)} if units else {},
        {"layer1/0/conv2/CRU": betas / betas.sum(1, keepdims=True)} if units else {},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explanation") / "new" / "out"
    networks = [explained(), explained("resnet20_small", gates=False, units=False)]
    return write(folder, build(FILES, networks, source="Weights: a <b> c."))


def pixels(page, index=0):
    return page.evaluate("i => document.querySelectorAll('#gallery canvas')[i].toDataURL()", index)


def opened(open_page, path, **options):
    page = open_page(path, **options)
    page.wait_for_selector("body[data-ready]")
    return page


def test_view_layer_class_and_strength_are_switched_by_the_keyboard(open_page, written):
    page = opened(open_page, next(path for path in written if path.name == PAGE))
    assert page.title() == "What scnet20_small and resnet20_small see in 3 images"
    assert page.locator("#gallery figure").count() == 3
    assert page.locator("#view option").all_inner_texts() == [
        "Grad-CAM", "Calibration gate", "SRU: informative", "SRU: redundant",
    ]  # fmt: skip
    assert page.locator("#layer option").all_inner_texts() == ["layer1", "layer2"]
    assert page.locator("#layer").input_value() == "1"

    seen = [pixels(page)]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "view"
    for control, key in (("layer", "ArrowUp"), ("option", "ArrowDown"), ("strength", "ArrowRight")):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == control
        page.keyboard.press(key)
        seen.append(pixels(page))
    assert len(set(seen)) == 4
    assert page.locator("#percent").inner_text() == "70 %"
    assert "layer1" in page.locator("#gallery canvas").first.get_attribute("aria-label")
    assert "Shown: class ../../etc (20.0 %)" in page.locator("#gallery figure").first.inner_text()

    # A network without the operator shows the image alone, and says so.
    page.select_option("#view", label="Calibration gate")
    assert page.locator("#layer option").all_inner_texts() == ["layer1, block 0", "layer2, block 0"]
    assert page.locator("#option option").count() == 9
    assert page.locator("#gallery canvas").nth(1).get_attribute("aria-label").endswith("resnet20_small: no Calibration gate")
    page.select_option("#option", index=3)
    assert pixels(page) not in seen


def test_weights_and_receptive_fields(open_page, written):
    page = opened(open_page, next(path for path in written if path.name == PAGE))
    assert "of 10 channels" in page.locator("#beta-text").inner_text()
    before = page.evaluate("document.getElementById('bars').toDataURL()")
    page.select_option("#beta-image", index=2)
    assert page.evaluate("document.getElementById('bars').toDataURL()") != before
    assert page.locator("#field-list figure").count() == 4
    assert "scnet20_small, layer2: 90 % within 16 × 16 px" in page.locator("#field-list").inner_text()


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_shows_hostile_names_as_text(open_page, written, dark):
    page = opened(open_page, next(path for path in written if path.name == PAGE), width=PHONE, dark=dark)
    assert_fits(page)
    assert page.evaluate("window.broken") is None
    texts = page.locator("#gallery figcaption strong").all_inner_texts()
    assert texts == FILES
    assert HOSTILE in page.locator("#gallery").inner_text()
    assert f"dog?{75 * 'o'}… (70.0 %)" in page.locator("#gallery").inner_text()
    assert page.locator("script").count() == 2
    assert page.locator("#gallery img").count() == 0


def test_files_are_written_under_fixed_names_only(written):
    assert {path.name for path in written} == {
        PAGE, "grad_cam.png", "beside.png", "gates.png", "sru.png", "cru.png", "receptive_fields.png",
    }  # fmt: skip
    assert {path.parent.name for path in written} == {"out"}
    assert len(list(written[0].parent.iterdir())) == 7
    html = written[0].read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert HOSTILE not in html
    for path in written[1:]:
        assert path.read_bytes().startswith(scconv_jax.images.PNG)


def test_after_an_error_no_file_and_no_folder_remains(tmp_path):
    with pytest.raises(TypeError):
        write(tmp_path / "a" / "b", {"one.png": b"1", "two.png": None})
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one.png").write_bytes(b"old")
    with pytest.raises(TypeError):
        write(tmp_path / "out", {"one.png": b"1", "two.png": None})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one.png"]
    assert (tmp_path / "out" / "one.png").read_bytes() == b"old"


def test_a_page_alone(tmp_path):
    assert write(tmp_path / "a.html", {PAGE: b"page", "x.png": b""}) == [tmp_path / "a.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_grey_images_and_one_image():
    one = explained()
    grey = dataclasses.replace(one, images=one.images[..., :1], gates={}, separations={}, fusions={})
    contents = build(FILES, [grey])
    assert set(contents) == {PAGE, "grad_cam.png", "receptive_fields.png"}
    assert "<title>What scnet20_small sees in 3 images</title>" in page(
        FILES, [grey], title="What scnet20_small sees in 3 images", summary=""
    )
    assert "<title>&lt;b&gt;</title>" in page(FILES, [grey], title="<b>", summary="")


def test_values_in_colours():
    assert quantized(np.array([-1.0, 0, 0.5, 1, 2, np.nan]), 0, 1).tolist() == [0, 0, 128, 255, 255, 0]
    assert quantized(np.ones(2), 1, 1).tolist() == [0, 0]
    light, dark = coloured(np.ones((2, 2)), 0, 1), coloured(np.zeros((2, 2)), 0, 1)
    assert (light > dark).all()


def test_extent_is_the_square_that_holds_a_share():
    field = np.zeros((9, 9))
    field[3:6, 3:6] = 1
    assert extent(field) == 3
    field[4, 4] = 1000
    assert extent(field) == 1
    assert extent(np.zeros((4, 4))) == 0
    assert extent(np.ones((5, 5))) == 5


def test_labels_of_paths():
    assert label("layer3/1/scconv") == label("layer3/1/conv2/SRU") == "layer3, block 1"
    assert label("calibrated/scconv") == "calibrated/scconv"


def test_a_sheet_of_long_names():
    assert sheet("T" * 999, ["c" * 99], [], "word " * 200).startswith(scconv_jax.images.PNG)
