import importlib.util
import struct
import sys
from pathlib import Path
from unittest import mock

import pytest

from train.config import ConfigError, Log
from train.run.metrics import Metrics
from train.run.trackers import check_trackers, open_trackers


def events(folder):
    """(step, tag, value) of every scalar in the event files, read as they are laid out: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found, voided = [], []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found += [(event.step, value.tag, round(value.simple_value, 4)) for value in event.summary.value]
            if event.HasField("session_log"):
                voided.append(event.step)
    return found, voided


def test_tensorboard_gets_every_line(tmp_path):
    log = Log(tensorboard=True)
    with Metrics(tmp_path / "metrics.jsonl", trackers=open_trackers(log, tmp_path, 0, {})) as metrics:
        metrics.write(3, epoch=0.5, **{"train/loss": 2.5})
        metrics.write(6, epoch=1, **{"eval/top1": 0.25})
    found, voided = events(tmp_path / "tensorboard")
    assert found == [(3, "epoch", 0.5), (3, "train/loss", 2.5), (6, "epoch", 1.0), (6, "eval/top1", 0.25)]
    assert not voided


def test_tensorboard_is_told_which_steps_a_resumed_run_does_again(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", trackers=open_trackers(Log(tensorboard=True), tmp_path, 4, {})) as metrics:
        metrics.write(5, epoch=1)
    assert events(tmp_path / "tensorboard")[1] == [5]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    workdir.mkdir()
    for step in (1, 2):
        trackers = open_trackers(Log(wandb=True), workdir, 0, {"seed": 7})
        with Metrics(tmp_path / "metrics.jsonl", trackers=trackers) as metrics:
            metrics.write(step, epoch=step, **{"train/loss": 0.5})
    files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (workdir / "wandb" / "run-id").read_text()
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}, "a resumed run is the same run"
    assert all(path.stat().st_size for path in files)


def test_weights_and_biases_gets_every_line(tmp_path, monkeypatch):
    import wandb

    run, told = mock.Mock(), {}
    monkeypatch.setattr(wandb, "init", lambda **options: told.update(options) or run)
    trackers = open_trackers(Log(wandb=True, wandb_project="mine"), tmp_path / "digits", 0, {"seed": 7})
    with Metrics(tmp_path / "metrics.jsonl", trackers=trackers) as metrics:
        metrics.write(3, epoch=0.5, **{"train/loss": 2.5})
    assert (told["project"], told["name"], told["config"]) == ("mine", "digits", {"seed": 7})
    run.log.assert_called_once_with({"step": 3, "epoch": 0.5, "train/loss": 2.5})
    run.finish.assert_called_once_with()


def test_weights_and_biases_without_a_login_is_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nMore of it")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"^Weights & Biases: No API key configured; WANDB_MODE=offline keeps [^\n]*$"):
        open_trackers(Log(wandb=True), tmp_path, 0, {})


@pytest.mark.parametrize(("field", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, field, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    check_trackers(Log())
    with pytest.raises(ModuleNotFoundError, match=rf"^log.{field} needs {package}: pip install 'scconv-jax\[{field}\]'"):
        check_trackers(Log(**{field: True}))


def test_no_tracker_unless_asked_for(tmp_path):
    assert open_trackers(Log(), tmp_path, 0, {}) == []
    assert not list(Path(tmp_path).iterdir())
    assert "tensorflow" not in sys.modules
