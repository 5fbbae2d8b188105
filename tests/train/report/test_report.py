"""The report of a run: its numbers by hand, its pictures and its page with hostile names and with a thousand classes."""

import numpy as np
import pytest

from tests.browser import assert_fits
from train.config import Config
from train.data.datasets import ArraySource, Dataset
from train.report.results import Results
from train.report.write import write_report


def made(classes, count, seed=0):
    numbers = np.random.default_rng(seed)
    label = (np.arange(count) % classes).astype(np.int32)
    predicted = np.where(numbers.uniform(size=count) < 0.7, label, (label + 1) % classes).astype(np.int32)
    confidence = numbers.uniform(0.3, 1, count).astype(np.float32)
    return Results(np.arange(count), label, predicted, confidence, np.where(label == predicted, confidence, 0.1))


def dataset(names, count):
    images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), np.uint8)
    source = ArraySource(images, (np.arange(count) % len(names)).astype(np.int32))
    return Dataset(source, source, tuple(names), (0.5,) * 3, (0.25,) * 3, resize=8)


def test_numbers_by_hand():
    results = Results(
        np.arange(4),
        np.int32([0, 1, 1, 0]),
        np.int32([0, 0, 1, 1]),
        np.float32([0.9, 0.6, 0.9, 0.8]),
        np.float32([0.9, 0.4, 0.9, 0.2]),
    )
    assert results.mistakes().tolist() == [3, 1]
    assert results.confusion(2).tolist() == [[1, 1], [1, 1]]
    count, _, _, error = results.calibration()
    assert (count[13], count[11], count[8], count.sum()) == (2, 1, 1, 4)
    # Bins: two images at 0.9, both right; one at 0.8 and one at 0.6, both wrong.
    assert error == pytest.approx((2 * 0.1 + 0.8 + 0.6) / 4, abs=1e-6)


def test_names_are_escaped_and_the_page_fits_a_phone(tmp_path, open_page):
    names = ["<script>console.error('x')</script>", "../../etc/passwd", "$x_1", "a" * 200, "n01440764"]
    path = write_report(tmp_path, Config(), dataset(names, 40), made(5, 40), step=7, checkpoint="best checkpoint, step 7")
    assert {file.name for file in tmp_path.iterdir()} == {"report", "report.html"}
    assert "<script>" not in path.read_text()
    for width in (1280, 390):
        page = open_page(path, width=width)
        assert page.locator("script").count() == 0
        assert "tench" in page.inner_text("body")
        assert_fits(page)


def test_a_thousand_classes_and_no_mistakes(tmp_path):
    names = [f"class {number}" for number in range(1000)]
    results = made(1000, 3000)
    right = Results(results.index, results.label, results.label, results.confidence, results.confidence)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "epoch": 1, "eval/loss": 1, "eval/top1": 0.5, "seconds": 61.2}\n')
    for found, said in ((results, "The 24 of"), (right, "There are no mistakes.")):
        path = write_report(tmp_path, Config(), dataset(names, 3000), found, step=7, checkpoint="best")
        assert said in path.read_text()
        assert "1 min 1 s" in path.read_text()
        assert "Above, the confusion matrix: " in path.read_text()
    assert path.stat().st_size < 2_000_000
