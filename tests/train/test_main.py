"""The command line: in this process with a tiny network, and, where a process must die, in processes of its own."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import scconv_jax
from benchmarks import kills
from tests.train.tiny import create_tiny, final_state, work_with_tiny
from train import distributed as hosts
from train import loop
from train.config.files import load_config
from train.distributed import Signals
from train.main import main, parse, plan_run
from train.run import workdir as folders
from train.run.checkpoints import Checkpoints
from train.run.metrics import best_line, read_metrics
from train.step import AXIS

ROOT = Path(__file__).parents[2]
SMALL = """
from train.config import Config, Data, Log, Optim

config = Config(
    epochs=3,
    log_every=3,
    data=Data(name="synthetic", image_size=8, batch_size=16, crop_padding=1, synthetic_train=80, synthetic_test=27),
    optim=Optim(lr=0.1),
    log=Log(report=False),
)
"""

LEFT = {".lock", "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model.json"}
"""What a run leaves in its folder."""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder to work in, with `small.py`: 3 epochs of 5 steps of a tiny network."""
    return work_with_tiny(tmp_path, monkeypatch, SMALL)


def evaluations(workdir):
    return [
        {key: line[key] for key in ("step", "epoch", "eval/loss", "eval/top1")}
        for line in read_metrics(Path(workdir) / "metrics.jsonl")
        if "eval/loss" in line
    ]


def test_a_run_leaves_what_it_promises(small, capsys):
    assert main(["--config", small]) == 0
    run = Path("runs/small")
    assert {path.name for path in run.iterdir()} == LEFT
    assert folders.load_run(run) == load_config(Path(small))
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 5, 5, 6, 9, 10, 10, 12, 15, 15]
    for line in lines:
        kind = "eval" if "eval/loss" in line else "train"
        assert {"step", "epoch", f"{kind}/loss", f"{kind}/top1"} <= line.keys()
        assert line["epoch"] == pytest.approx(line["step"] / 5)
    assert all(line["images_per_second"] > 0 for line in lines if "train/loss" in line)
    assert (run / "checkpoints" / "15" / "state").is_dir()
    last = lines[-1]["eval/top1"]
    assert last * 27 == pytest.approx(round(last * 27)), "all 27 test images count, each once"
    assert lines[-1]["eval/images"] == 27
    out = capsys.readouterr().out
    assert f"Test accuracy {100 * last:.2f} % ({round(27 * last)} of 27) after the last epoch" in out
    assert out.count("\nepoch ") == 3


def test_a_run_that_is_watched(small, capsys):
    assert main(["--config", small, "--epochs", "1", "--log.tensorboard", "--log.profile-steps", "2", "3"]) == 0
    assert len(list(Path("runs/small/tensorboard").iterdir())) == 1
    assert list(Path("runs/small/profile").rglob("*.xplane.pb"))
    assert "wrote the profile of steps 2 to 3 to runs/small/profile" in capsys.readouterr().out
    line = read_metrics(Path("runs/small/metrics.jsonl"))[0]
    assert {"waiting_for_data", "multiply_adds_per_second", "train/top5"} <= line.keys()


def test_a_profile_of_steps_that_never_come_is_an_error(small, capsys):
    assert main(["--config", small, "--epochs", "1", "--profile-steps", "6", "7"]) == 2
    assert capsys.readouterr().err == "error: log.profile_steps starts at step 6, but the run has 5 steps\n"
    assert not Path("runs").exists()


def test_evaluate_repeats_the_best_or_the_last_result_and_writes_nothing(small, capsys):
    main(["--config", small, "--optim.lr", "3"])
    tested = [line for line in read_metrics(Path("runs/small/metrics.jsonl")) if "eval/top1" in line]
    last, best = tested[-1], best_line(tested)
    assert best["step"] < last["step"] == 15, "this test needs a run that was better before"
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    for flags, line, said in (
        ([], best, "Testing the best checkpoint (--latest: that of step 15).\n"),
        (["--best"], best, "Testing the best checkpoint (--latest: that of step 15).\n"),
        (["--latest"], last, f"Testing the latest checkpoint (the best, of step {best['step']}, without --latest).\n"),
    ):
        capsys.readouterr()
        assert main(["--config", small, "--evaluate", *flags]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert f"step {line['step']}: test accuracy {100 * line['eval/top1']:.2f} %" in out
        assert f"loss {line['eval/loss']:.4f}" in out
    assert scconv_jax.load(Path("runs/small")).metadata["step"] == str(best["step"]), "one rule for all who read a run"
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()} == before


def test_resuming_an_old_run_adds_what_answers_need(small):
    assert main(["--config", small, "--epochs", "1"]) == 0
    record = Path("runs/small/model.json")
    written = record.read_text()
    found = json.loads(written)
    assert found["class_names"] == [str(label) for label in range(10)]
    assert (found["preparation"]["size"], found["preparation"]["resize"]) == (8, 8)
    record.unlink()
    assert main(["--config", small, "--epochs", "2", "--resume"]) == 0
    assert record.read_text() == written


def test_a_report_is_written_and_its_failure_is_none_of_the_run(small, capsys, monkeypatch):
    assert main(["--config", small, "--epochs", "1", "--log.report"]) == 0
    run = Path("runs/small")
    assert f"Report: {run / 'report.html'}" in capsys.readouterr().out
    pictures = {"calibration.png", "classes.png", "confusion.png", "numbers.json", "worst.png"}
    assert {path.name for path in (run / "report").iterdir()} == pictures
    numbers = json.loads((run / "report" / "numbers.json").read_text())
    tested = read_metrics(run / "metrics.jsonl")[-1]
    assert (numbers["images"], numbers["step"]) == (27, 5)
    assert numbers["top1"] == pytest.approx(tested["eval/top1"])
    assert "http" not in (run / "report.html").read_text().replace("http-equiv", "")

    def fail(*_, **__):
        raise OSError("full")

    monkeypatch.setattr("train.report.write.write_report", fail)
    assert main(["--config", small, "--epochs", "1", "--log.report", "--workdir", "other"]) == 0
    assert "warning: no report was written (OSError: full). To try again: python -m train.report other" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["shard_map", "pmap"])
def test_the_same_seed_gives_the_same_run(small, engine):
    for workdir in ("a", "b"):
        assert main(["--config", small, "--workdir", workdir, "--parallel", engine]) == 0
    assert final_state("a") == final_state("b")
    assert main(["--config", small, "--workdir", "c", "--parallel", engine, "--seed", "1"]) == 0
    assert final_state("c") != final_state("a")


def test_the_model_is_made_as_the_config_says(small, monkeypatch):
    made = []
    monkeypatch.setattr(
        scconv_jax, "create_model", lambda *name, **options: made.append((name, options)) or create_tiny(*name, **options)
    )
    flags = ["--model.name", "scnet50", "--model.dtype", "bfloat16", "--model.sync-batchnorm", "--data.synthetic-classes", "7"]
    assert main(["--config", small, "--epochs", "1", *flags]) == 0
    options = {"num_classes": 7, "in_channels": 3, "dtype": jnp.bfloat16}
    assert made == [(("scnet50",), options | {"axis_name": AXIS}), (("scnet50",), options)], "the second is only traced"


def test_a_second_run_takes_the_next_folder_and_resume_the_last(small, capsys):
    flags = ["--config", small, "--epochs", "1"]
    assert main(flags) == main(flags) == main(flags) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["small", "small-2", "small-3"]
    capsys.readouterr()
    assert main(["--config", small, "--resume", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "changed since the run began: epochs: 1 → 2" in out
    assert "Writing to runs/small-3, resuming from step 5 of 10" in out
    assert [line["step"] for line in evaluations("runs/small-3")] == [5, 10]
    assert folders.load_run(Path("runs/small-3")).epochs == 2


def test_a_run_resumes_with_its_own_config(small, capsys):
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1", "--optim.lr", "0.07"]) == 0
    Path(small).unlink()
    for flags in (["--resume", "mine"], ["--workdir", "mine", "--resume"]):
        capsys.readouterr()
        assert main(flags) == 0
        assert "resuming from step 5 of 5" in capsys.readouterr().out
    assert folders.load_run(Path("mine")).optim.lr == 0.07


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "smal.py"], "no config file smal.py; there is small.py"),
        (["--optim.lrr", "3"], "there is no flag --optim.lrr. Did you mean '--optim.lr'"),
        (["--optim.lr", "-1"], "Optim.lr must be above 0, found -1.0"),
        (["--model.name", "scnet5"], "model.name 'scnet5': There is no model 'scnet5'. Did you mean 'scnet50'"),
        (["--data.batch-size", "20"], "data.batch_size 20 does not divide over 8 devices: use 16 or 24"),
        (["--data.batch-size", "88"], "data.batch_size 88 is more than the 80 training images"),
        (
            ["--data.batch-size", "8", "--data.image-size", "2"],
            "data.batch_size 8 gives each of 8 devices one image, too few for the BatchNorm of scnet20_small at 2 × 2 pixels",
        ),
        (
            ["--model.dtype", "float64"],
            "model.dtype float64 needs 64-bit numbers in JAX: set JAX_ENABLE_X64=1 in the environment",
        ),
        (["--workdir", "small.py"], "cannot write to small.py: File exists; choose another --workdir"),
        (["--workdir", "small.py/x"], "cannot write to small.py/x: Not a directory; choose another"),
        (["--resume"], "no run in runs/small: it has no config.json"),
        (["--evaluate", "--workdir", "nowhere"], "no run in nowhere: it has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(small, capsys, flags, message):
    before = sorted(Path().rglob("*"))
    assert main(["--config", small, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before, "nothing is written"


@pytest.mark.slow
def test_a_run_with_every_option_resumes_in_the_same_bits(small):
    """Averaged weights, mixing, RandAugment, clipping and LARS leave nothing outside the checkpoint."""
    flags = "--optim.ema 0.9 --augment.mixup 0.2 --augment.cutmix 1 --augment.randaugment 1 --optim.name lars"
    flags = ["--config", small, *flags.split(), "--optim.clip-norm", "1", "--optim.schedule", "step", "--model.rematerialise"]
    assert main([*flags, "--workdir", "whole", "--epochs", "2"]) == 0
    assert main([*flags, "--workdir", "halves", "--epochs", "1"]) == 0
    assert main(["--resume", "halves", "--epochs", "2"]) == 0
    assert final_state("halves") == final_state("whole")
    assert any("ema" in name for name in final_state("whole"))
    assert evaluations("halves") == evaluations("whole")


def test_a_run_is_never_overwritten(small, capsys):
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1"]) == 0
    kept = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    capsys.readouterr()
    for flags, message in (
        (
            ["--optim.lr", "0.3"],
            "mine already holds a run, with epochs 1, not 3; optim.lr 0.1, not 0.3: add --resume to continue it",
        ),
        (["--epochs", "1"], "mine already holds a run: add --resume to continue it, or choose another --workdir"),
        (
            ["--resume", "--model.name", "resnet20_small"],
            "mine holds a run with model.name 'scnet20_small', not 'resnet20_small'",
        ),
        (["--resume", "--data.batch-size", "8"], "mine holds a run with data.batch_size 16, not 8"),
        (["--evaluate", "--model.name", "scnet50"], "mine holds a run with model.name 'scnet20_small', not 'scnet50'"),
    ):
        assert main(["--config", small, "--workdir", "mine", *flags]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {message}")
        assert captured.err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()} == kept


def test_two_runs_in_one_folder(small, capsys):
    with folders.locked_folder(Path("mine")):
        holder = Path("mine/.lock").read_text().strip()
        assert str(os.getpid()) in holder
        assert main(["--config", small, "--workdir", "mine"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: mine is in use by {holder}: wait for it, or choose another --workdir\n"
    assert sorted(path.name for path in Path("mine").iterdir()) == [".lock"]
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1"]) == 0


def test_a_run_in_a_folder_with_pattern_characters_that_is_renamed_while_it_runs(small, capsys, monkeypatch):
    """The run follows its folder: every file is there at the end, and nothing at the old place."""
    done = Checkpoints.save

    def save(self, state, metrics=None):
        done(self, state, metrics)
        self.wait()
        if int(state.step) == 5:
            Path("run[1]").rename("a?b")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert main(["--config", small, "--workdir", "run[1]"]) == 0
    assert not Path("run[1]").exists()
    assert {path.name for path in Path("a?b").iterdir()} == LEFT
    assert f"Curves: {Path('a?b').resolve() / 'curves.png'}" in capsys.readouterr().out
    assert main(["--config", small, "--workdir", "whole"]) == 0
    assert final_state("a?b") == final_state("whole")
    assert evaluations("a?b") == evaluations("whole")
    capsys.readouterr()
    assert main(["--resume", "a?b"]) == 0
    assert "resuming from step 15 of 15" in capsys.readouterr().out


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    """As Lustre without its option `flock`."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with folders.locked_folder(tmp_path / "run"):
        warning = f"warning: {tmp_path}/run cannot be locked (Function not implemented): do not use it twice at a time\n"
        assert capsys.readouterr().err == warning


def test_a_run_that_lost_its_config_is_not_taken_for_a_fresh_folder(small, capsys):
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1"]) == 0
    good = final_state("mine")
    for content, message in (
        (b"\xff\0", "mine/config.json is not the config of a run: "),
        (None, "mine holds checkpoints but no config.json: restore the file, or choose another --workdir"),
    ):
        Path("mine/config.json").unlink() if content is None else Path("mine/config.json").write_bytes(content)
        for flags in (["--config", small, "--workdir", "mine"], ["--resume", "mine"]):
            capsys.readouterr()
            assert main(flags) == 2
            captured = capsys.readouterr()
            assert captured.err.startswith(f"error: {message}")
            assert captured.err.count("\n") == 1
    assert final_state("mine") == good


def test_a_run_that_lost_its_metrics_goes_on(small, capsys):
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1"]) == 0
    Path("mine/metrics.jsonl").unlink()
    capsys.readouterr()
    assert main(["--resume", "mine"]) == 0
    assert "No test result in mine/metrics.jsonl. The checkpoints are complete" in capsys.readouterr().out
    assert main(["--resume", "mine", "--epochs", "2"]) == 0
    assert [line["step"] for line in evaluations("mine")] == [10]


def test_a_signal_sent_twice_is_one(monkeypatch):
    """`timeout` sends its own to the process and to the group; a Ctrl-C after a while is another."""
    with Signals() as signals:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert signals.stop_after(1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(hosts, "DOUBLE_SIGNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_folder_with_other_things_in_it_may_be_used(small):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1"]) == 0
    assert Path("mine/notes.txt").read_text() == "keep me"


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(small, capsys):
    assert main(["--config", small, "--workdir", "mine", "--epochs", "1"]) == 0
    good = final_state("mine")
    capsys.readouterr()
    assert main(["--resume", "mine", "--epochs", "3", "--optim.lr", "1e30"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the training loss is ")
    assert " at step 7;" in captured.err, "step 6 takes the step that breaks it; step 7 is the first to see it"
    assert captured.err.count("\n") == 1
    assert final_state("mine") == good


def test_a_run_that_died_before_its_first_checkpoint_starts_over(small):
    config, workdir = plan_run(parse(["--config", small]))[0], Path("runs/small")
    workdir.mkdir(parents=True)
    folders.save_config(workdir, config)
    (workdir / "metrics.jsonl").write_text('{"step": 3, "epoch": 0.6}\n')
    assert main(["--config", small, "--resume"]) == 0
    assert main(["--config", small, "--workdir", "whole"]) == 0
    assert evaluations(workdir) == evaluations("whole")
    assert final_state(workdir) == final_state("whole")


LONG = ["--config", "small.py", "--data.synthetic-train", "3200", "--log-every", "1"]


def start(*flags):
    """A run with 3 epochs of 200 steps, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.tiny", *flags],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_killed_at_any_moment_ends_in_the_same_bits():
    assert finish(start(*LONG, "--workdir", "whole"))[0] == 0
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        workdir = Path(f"killed-{code}")
        process = start(*LONG, "--workdir", str(workdir))
        metrics = workdir / "metrics.jsonl"
        while not metrics.exists() or not (lines := read_metrics(metrics)) or lines[-1]["step"] < 230:
            assert process.poll() is None, finish(process)
            time.sleep(0.002)
        process.send_signal(signum)
        returncode, out, err = finish(process)
        assert returncode == code, err
        with Checkpoints(workdir, keep=9) as checkpoints:
            saved = checkpoints.latest()
        if signum == signal.SIGKILL:
            assert saved is not None
            assert saved % 200 == 0
        else:
            assert saved is not None
            assert saved % 200 != 0, "stopped within an epoch"
            assert (
                f"Stopped and saved at step {saved} of 600. To resume: python -m train.main --workdir {workdir} --resume\n" in out
            )
            assert err == ""
        returncode, out, err = finish(start("--workdir", str(workdir), "--resume"))
        assert returncode == 0, err
        assert f"resuming from step {saved} of 600" in out
        assert final_state(workdir) == final_state("whole")
        assert evaluations(workdir) == evaluations("whole")
        steps = [line["step"] for line in read_metrics(metrics) if "train/loss" in line]
        assert steps == list(range(1, 601))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_killed_where_it_hurts_ends_in_the_same_bits(tmp_path):
    """In start-up, in the first steps, in a save, in a test: `benchmarks.kills` is the long form."""
    kills.prepare(tmp_path)
    moments = ["start-up", "the first steps", "a save", "a test"]
    killed, _ = kills.kill_and_resume(tmp_path, moments, seed=1)
    assert killed.total() == 4
    kills.compare(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_full_disk_ends_the_run_and_keeps_what_there_is():
    """As a limit on the size of files: metrics fit, a checkpoint does not."""
    assert finish(start("--config", "small.py", "--workdir", "mine", "--epochs", "1"))[0] == 0
    good = final_state("mine")
    limited = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        "runpy.run_module('tests.train.tiny', run_name='__main__')"
    )
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    process = subprocess.run(
        [sys.executable, "-c", limited, "--resume", "mine", "--epochs", "9"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    reason = "error: the checkpoint of step 10 cannot be written: File too large; the checkpoints written before are kept\n"
    assert process.stderr == reason
    assert final_state("mine") == good
    code, _, err = finish(start("--resume", "mine", "--epochs", "2"))
    assert code == 0, err


def test_output_that_nobody_reads_ends_the_program_in_silence():
    """As `python -m train.main --help | head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "train.main", "--help"]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_the_curves_are_drawn_after_each_epoch(small, monkeypatch):
    drawn = []
    monkeypatch.setattr(loop, "CURVES_SECONDS", 0)
    monkeypatch.setattr(loop, "draw_curves", lambda *_, **__: drawn.append(len(evaluations("runs/small"))))
    assert main(["--config", small, "--epochs", "2"]) == 0
    assert drawn == [1, 2, 2], "the last is that of the finished run"


def test_programs_are_kept_unless_the_user_says_no(small, monkeypatch):
    kept: list[bool] = []
    settings: Any = jax.config
    before = settings.jax_enable_compilation_cache
    monkeypatch.setattr(scconv_jax, "keep_programs", lambda: kept.append(settings.jax_enable_compilation_cache))
    monkeypatch.setattr(loop, "train", lambda *_: 0)
    try:
        assert main(["--config", small]) == main(["--config", small, "--no-compile-cache"]) == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    assert kept == [before, False]


@pytest.mark.slow
def test_the_program_as_a_user_starts_it(tmp_path):
    """Help at once, and two epochs of a network of the library, quietly, on one device."""
    program = [sys.executable, "-W", "error", "-m", "train.main"]
    environment = {**os.environ, "XLA_FLAGS": ""}

    def run(*flags):
        return subprocess.run([*program, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    help_ = run("--help")
    assert help_.returncode == 0
    for text in ("--config FILE", "--workdir DIR", "--resume", "--evaluate", "--parallel {shard_map,pmap}", "--optim.lr FLOAT"):
        assert text in help_.stdout
    assert "configs/digits.py" in help_.stdout

    flags = ["--config", "configs/synthetic.py", "--workdir", str(tmp_path / "run")]
    trained = run(*flags)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert "scnet20_small (220,826 parameters)" in trained.stdout
    assert "Test accuracy" in trained.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["name"] == "synthetic"
    again = run(*flags)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
