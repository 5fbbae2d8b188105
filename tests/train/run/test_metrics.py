import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from train.run.curves import draw_curves
from train.run.metrics import Metrics, MetricsWindow, best_line, read_metrics, seconds_of
from train.run.progress import Progress


def test_metrics_are_one_json_object_per_line_written_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.write(1, epoch=0.5, **{"train/loss": 2.25})
        assert json.loads(path.read_text()) == {"step": 1, "epoch": 0.5, "train/loss": 2.25, "seconds": 0.0}
        metrics.write(2, epoch=1)
    assert [line | {"seconds": 0} for line in read_metrics(path)] == [
        {"step": 1, "epoch": 0.5, "train/loss": 2.25, "seconds": 0}, {"step": 2, "epoch": 1, "seconds": 0},
    ]  # fmt: skip


def test_the_time_of_training_counts_all_parts_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert seconds_of(tmp_path) is None
    began = time.perf_counter() - 100
    with Metrics(path, began=began) as metrics:
        metrics.write(4, epoch=1)
        metrics.write(9, epoch=2)
    with Metrics(path, first_step=4, began=time.perf_counter() - 30) as metrics:  # step 9 was lost
        metrics.write(8, epoch=2)
    assert seconds_of(tmp_path) == pytest.approx(130, abs=5)
    path.write_text('{"step": 4, "epoch": 1}\n')  # of an earlier version
    with Metrics(path, first_step=4) as metrics:
        assert metrics.seconds is None
        metrics.write(8, epoch=2)
    assert seconds_of(tmp_path) is None


def test_metrics_refuse_what_is_not_json(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl") as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.write(1, epoch=1, **{"train/loss": float("nan")})


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    """Lines past the resumed step go, and so does a line cut off in mid-write."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "epoch": {step}}}\n' for step in (2, 4, 4, 6)) + '{"step": 8, "ep')
    with Metrics(path, first_step=4) as metrics:
        metrics.write(5, epoch=5)
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 4, 5]
    with Metrics(path) as metrics:
        metrics.write(1, epoch=1)
    assert [line["step"] for line in read_metrics(path)] == [1]


def test_damaged_lines_are_left_out_and_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "epoch": 1}', b'{"step": 1, "ep', b"17", b"\xff\xfe{}", bytes(9), b"", b'{"step": "a", "epoch": 1}']
    path.write_bytes(b"\n".join([*lines, b'{"step": 2, "epoch": 2}', b'{"step": 3']))
    with Metrics(path, first_step=5):
        pass
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert path.read_bytes().count(b"\n") == 2
    assert capsys.readouterr().err == f"warning: 6 damaged lines of {path} were left out\n"


def values(loss, top1=0.5):
    return {"loss": jnp.float32(loss), "top1": jnp.float32(top1)}


def test_a_window_gives_means_and_begins_anew():
    window = MetricsWindow(batch_size=8)
    window.add(1, values(1.0, 0.25))
    window.add(2, values(2.0, 0.75))
    first = window.close()
    assert first.pop("images_per_second") > 0
    assert first.pop("waiting_for_data") == 0
    assert first == {"train/loss": 1.5, "train/top1": 0.5}
    window.add(3, values(4.0))
    assert window.close()["train/loss"] == 4.0


def test_a_window_without_time_has_no_speed():
    window = MetricsWindow(batch_size=8)
    window.add(1, values(1.0))
    window.restart_clock()
    assert "images_per_second" not in window.close()


def test_speed_waiting_and_cost(monkeypatch):
    """Two steps of 8 images in 4 s, 1 s of which passed waiting, at 1e9 multiply-adds an image and a peak of 1e10."""
    clock, waited = SimpleNamespace(now=100.0), SimpleNamespace(total=7.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    window = MetricsWindow(batch_size=8, waited=lambda: waited.total, multiply_adds=10**9, peak=1e10)
    for seconds, waits, slow in ((4.0, 1.0, True), (4.0, 0.3, False), (0.5, 0.5, False)):
        window.add(1, values(1.0))
        window.add(2, values(1.0))
        clock.now += seconds
        waited.total += waits
        found = window.close()
        assert found["images_per_second"] == 16 / seconds
        assert found["waiting_for_data"] == pytest.approx(waits / seconds)
        assert found["multiply_adds_per_second"] == 16e9 / seconds
        assert found["peak_share"] == 1.6 / seconds
        assert window.slow_input == slow


def test_the_host_runs_no_more_than_two_steps_ahead(monkeypatch):
    awaited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda step: awaited.append(step[0]))
    window = MetricsWindow(batch_size=8)
    for step in range(1, 6):
        window.add(step, values(1.0))
        assert awaited == list(range(1, step - 1))


def test_the_device_is_idle_when_the_last_step_is_done():
    window, done = MetricsWindow(batch_size=8), []
    assert window.idle()
    window.add(1, {"loss": SimpleNamespace(is_ready=lambda: bool(done))})
    assert not window.idle()
    done.append(True)
    assert window.idle()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_by_its_first_step(bad):
    window = MetricsWindow(batch_size=8)
    for step, loss in ((4, 1.0), (5, bad), (6, float("nan"))):
        window.add(step, values(loss))
    with pytest.raises(FloatingPointError, match=rf"^the training loss is {bad} at step 5$"):
        window.close()


def test_no_bar_where_there_is_no_terminal(capsys):
    with Progress(total_steps=4, first_step=0, batch_size=2) as progress:
        progress.advance("epoch 1/2")
        progress.say("epoch 1/2   done")
    captured = capsys.readouterr()
    assert captured.out == "epoch 1/2   done\n"
    assert captured.err == ""


def test_a_warning_is_said_once(capsys):
    with Progress(total_steps=4, first_step=0, batch_size=2) as progress:
        for _ in range(2):
            progress.say("warning: slow", once=True)
            progress.say("again")
    assert capsys.readouterr().out == "warning: slow\nagain\nagain\n"


def test_the_best_is_the_latest_of_equals():
    tested = [{"step": 10 * epoch, "epoch": epoch, "eval/top1": top1} for epoch, top1 in enumerate((0.1, 0.9, 0.9, 0.3))]
    assert best_line(tested)["epoch"] == 2


def test_curves_of_a_loss_of_0_are_drawn_without_a_warning(tmp_path):
    """Warnings are errors here. Neither a logarithmic axis nor matplotlib's font likes these."""
    with Metrics(tmp_path / "metrics.jsonl", 0) as metrics:
        metrics.write(1, epoch=1.0, **{"train/loss": 0.0, "train/top1": 1.0, "eval/loss": 0.0, "eval/top1": 1.0})
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="犬 \t 猫")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_curves_are_a_picture(tmp_path, epochs):
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        for epoch in range(1, epochs + 1):
            metrics.write(epoch, epoch=epoch - 0.5, **{"train/loss": 1 / epoch, "train/top1": 0.5})
            metrics.write(epoch, epoch=epoch, **{"eval/loss": 2 / epoch, "eval/top1": 0.9})
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="scnet20_small on digits")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 1000
