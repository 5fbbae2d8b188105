"""The record of `benchmarks.device`: it is written after each measurement, and a failing one does not end the others."""

import json
import sys

import pytest

from benchmarks.device import Step, measure, page, plan_steps
from benchmarks.device_measurements import FORMS, MEASUREMENTS

HEAD = {"environment": "a machine", "platform": "cpu", "devices": 1, "memory for JAX": "unknown", "form": "Small form"}


def step(name, code, seconds=20.0):
    return Step(name, [sys.executable, "-c", code], seconds)


def test_each_measurement_is_recorded_at_once_and_failures_do_not_end_the_others(tmp_path):
    steps = [
        step("good", "print('noise'); print('{\"training, images/s\": 1234.5, \"training, peak memory\": null}')"),
        step("raises", "raise ValueError('too | bad')"),
        step("aborts", "import os; os.abort()"),
        step("hangs", "import time; time.sleep(60)", seconds=0.5),
        step("no result", "print('noise')"),
        step("reads", f"import json; print(json.dumps({{'record': open({str(tmp_path / 'device.json')!r}).read()}}))"),
    ]
    record = measure(steps, HEAD, tmp_path, budget=60)
    assert json.loads((tmp_path / "device.json").read_text()) == record
    found = record["measurements"]
    assert [measurement["status"] for measurement in found.values()] == ["done", *["failed"] * 4, "done"]
    assert found["good"]["result"] == {"training, images/s": 1234.5, "training, peak memory": None}
    assert found["raises"]["reason"] == "exit code 1: ValueError: too | bad"
    assert found["aborts"]["reason"].startswith("exit code -6: ")
    assert found["hangs"]["reason"] == "stopped after its limit of 0.5 s"
    assert found["hangs"]["seconds"] < 10
    assert found["no result"]["reason"] == "exit code 0: no message"
    before = json.loads(found["reads"]["result"]["record"])
    assert before["measurements"] == {**found, "reads": {"status": "not run"}}, "what a run that is cut off leaves"
    text = (tmp_path / "device.md").read_text()
    assert "GPU and TPU: not measured" in text
    assert "training, images/s | 1,234.5" in text
    assert "exit code 1: ValueError: too \\| bad" in text


def test_no_measurement_starts_after_the_budget(tmp_path):
    record = measure([step("late", "print('{}')")], HEAD, tmp_path, budget=0.5)
    assert record["measurements"] == {"late": {"status": "not run"}}
    assert "| late | not run |" in (tmp_path / "device.md").read_text()


@pytest.mark.parametrize(("second", "verdict"), [("a", "the same bits"), ("b", "DIFFERENT bits")])
def test_the_page_compares_two_deterministic_runs(second, verdict):
    runs = {
        f"bits: {name}": {"status": "done", "seconds": 1, "result": {"SHA-256 of the state": digest}}
        for name, digest in (("1", "a"), ("2", second))
    }
    assert page({**HEAD, "platform": "gpu", "measurements": runs}).endswith(f": {verdict}.\n")


@pytest.mark.parametrize("form", FORMS)
def test_every_measurement_is_planned(form):
    steps = plan_steps(form)
    assert {step.command[4] for step in steps} | {"device"} == MEASUREMENTS.keys()
    assert len({step.name for step in steps}) == len(steps)
    for kind in ("speed", "torch_speed"):
        assert [step.command[5] for step in steps if step.command[4] == kind] == list(FORMS[form].networks)
