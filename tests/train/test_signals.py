"""Signals that stop a run, while it trains, tests or waits for images that never arrive."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import scconv_jax
import train.main
from tests.train.test_main import SMALL, evaluations
from tests.train.tiny import final_state, work_with_tiny
from train.data import batches
from train.data.datasets import ArraySource
from train.distributed import Signals
from train.main import main


@pytest.fixture
def small(tmp_path, monkeypatch):
    return work_with_tiny(tmp_path, monkeypatch, SMALL)


@pytest.fixture
def hang(monkeypatch):
    """Returns `hang(when, signum)`: the first read for which `when(key)` never returns, and then the signal comes."""
    released, load = threading.Event(), ArraySource.load
    monkeypatch.setattr(batches, "CLOSE_SECONDS", 0.1)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a run obeys it, unless it was ignored when the run began
    ends: list[int] = []
    monkeypatch.setattr(train.main, "os", SimpleNamespace(**vars(os) | {"_exit": ends.append}))

    def arrange(when, signum):
        def hanging(self, index, key, out):
            if when(key) and not released.is_set():
                threading.Timer(1.0, os.kill, (os.getpid(), signum)).start()
                released.wait()
            return load(self, index, key, out)

        monkeypatch.setattr(ArraySource, "load", hanging)
        return ends

    def release():
        released.set()
        while batches.reads_hang():
            time.sleep(0.01)

    arrange.release = release
    yield arrange
    release()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_read_that_never_returns_is_left_behind(small, hang, signum, capsys):
    ends = hang(lambda key: key and key[1] == 7, signum)  # a training image of the eighth step
    assert main(["--config", small]) == 128 + signum
    assert ends == [128 + signum], "Python's own exit would wait for the read"
    assert re.search(r"Stopped and saved at step [0-7] of 15\. To resume:", capsys.readouterr().out)
    hang.release()
    assert main(["--resume", "runs/small"]) == main(["--config", small, "--workdir", "whole"]) == 0
    assert final_state("runs/small") == final_state("whole")
    assert evaluations("runs/small") == evaluations("whole")


@pytest.mark.parametrize("test", [1, 3])
def test_a_signal_during_a_test(small, hang, test, capsys):
    """The state is saved, and the test is done when the run resumes, as if it had not stopped."""
    reads: list[tuple] = []
    hang(lambda key: key == () and (reads.append(key) or len(reads) == 27 * (test - 1) + 20), signal.SIGUSR2)
    assert main(["--config", small]) == 128 + signal.SIGUSR2
    assert f"Stopped and saved at step {5 * test} of 15." in capsys.readouterr().out
    assert len(evaluations("runs/small")) == test - 1
    hang.release()
    assert main(["--resume", "runs/small"]) == main(["--config", small, "--workdir", "whole"]) == 0
    assert final_state("runs/small") == final_state("whole")
    assert evaluations("runs/small") == evaluations("whole")
    found, expected = (scconv_jax.runs.best_step(Path(run)) for run in ("runs/small", "whole"))
    assert found == expected


def test_an_ignored_hup_stays_ignored():
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.stopping()
            signal.raise_signal(signal.SIGUSR1)
            assert signals.stopping()
            assert signals.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
