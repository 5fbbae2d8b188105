import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import scconv_jax
from tests.train.tiny import Tiny
from train.config import CheckpointError, ConfigError, Optim
from train.optim import make_optimizer
from train.run.checkpoints import Checkpoints
from train.run.workdir import OpenFolder
from train.step import init_state

OPTIMIZER = make_optimizer(Optim(), optax.constant_schedule(0.1))


@pytest.fixture(scope="module")
def state():
    """A state no two of whose arrays are alike."""
    start = init_state(Tiny(), OPTIMIZER, (8, 8, 3), seed=0)
    leaves, tree = jax.tree.flatten(start)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(100 * rng.normal(size=x.shape), x.dtype) for x in leaves])


def at(state, step):
    return state.replace(step=jnp.asarray(step, jnp.int32))


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(at(state, 7), {"eval/top1": 0.5})
    assert (tmp_path / "checkpoints" / "7" / "state").is_dir()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(like=jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(at(state, 7)), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("name", ["run[1]", "[a-z]/run", "a*b", "what?", "**", "[", "{a,b} %20#"])
@pytest.mark.parametrize("proc", [True, False], ids=["with /proc", "without /proc"])
def test_a_folder_may_have_any_name(tmp_path, state, monkeypatch, name, proc):
    """Orbax reads `[`, `]`, `*` and `?` in the path of a checkpoint as a pattern, finds nothing and goes on."""
    if not proc:
        if name == "**":
            pytest.skip("Orbax refuses it, at the first save")
        monkeypatch.setattr(OpenFolder, "plain", lambda folder: folder.path().resolve())
    (tmp_path / name).mkdir(parents=True)
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        checkpoints.save(at(state, 1))
        checkpoints.save(at(state, 2))
    assert steps_in(tmp_path / name) == [2]
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        assert_same(checkpoints.restore(state), at(state, 2))
    assert_same(scconv_jax.load(tmp_path / name).variables["params"], state.params)


@pytest.fixture
def incomplete(tmp_path, state, monkeypatch):
    """A run of an earlier version in a folder with a pattern character: Orbax merged nothing, and nobody looked."""
    folder = tmp_path / "run[1]"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(OpenFolder, "plain", lambda folder: folder.path().resolve())
        patch.setattr(Checkpoints, "_look_up", lambda *_, **__: None)
        with Checkpoints(folder, keep=2) as checkpoints:
            for step, top1 in ((1, 0.5), (2, 0.4)):
                checkpoints.save(at(state, step), {"eval/top1": top1})
    return folder


def test_resuming_completes_what_an_earlier_version_left(incomplete, state, capsys):
    def files():
        return {path: path.read_bytes() for path in incomplete.rglob("*") if path.is_file()}

    before = files()
    with Checkpoints(incomplete, keep=2) as checkpoints, pytest.raises(ConfigError) as raised:
        checkpoints.restore(state)
    assert "`python -m train.main --resume RUN` completes such checkpoints" in str(raised.value)
    with pytest.raises(
        scconv_jax.WeightsError, match=r"its checkpoint 1 cannot be read: Orbax did not complete it.* --resume RUN"
    ):
        scconv_jax.load(incomplete)
    assert files() == before, "only a run that goes on may write"
    with Checkpoints(incomplete, keep=2) as checkpoints:
        assert_same(checkpoints.restore(state, repair=True), at(state, 2))
        said = [f"completed the checkpoint of step {step}, which Orbax had left incomplete" for step in (1, 2)]
        assert capsys.readouterr().out.splitlines() == said
        assert_same(checkpoints.restore(state, step=1), at(state, 1))
    assert scconv_jax.load(incomplete).metadata == {"step": "1"}
    assert before.items() <= files().items()


def test_a_full_disk_does_not_make_an_incomplete_checkpoint_a_damaged_one(incomplete, state, monkeypatch):
    def full(_):
        raise ValueError("Error writing local file: No space left on device")

    with monkeypatch.context() as patch, Checkpoints(incomplete, keep=2) as checkpoints:
        patch.setattr(scconv_jax.runs, "complete", full)
        with pytest.raises(ConfigError, match=r"^the checkpoint of step 1 cannot be completed: No space left on device$"):
            checkpoints.restore(state, repair=True)
    assert steps_in(incomplete) == [1, 2]
    with Checkpoints(incomplete, keep=2) as checkpoints:
        assert_same(checkpoints.restore(state, repair=True), at(state, 2))


def test_a_checkpoint_that_cannot_be_completed_gives_way_to_the_one_before(incomplete, state, capsys):
    for path in (incomplete / "checkpoints" / "2" / "state").glob("ocdbt.process_0/manifest.ocdbt"):
        path.write_bytes(b"damaged")
    with Checkpoints(incomplete, keep=2) as checkpoints:
        assert_same(checkpoints.restore(state, repair=True), at(state, 1))
    assert "warning: the checkpoint of step 2 is damaged (state: " in capsys.readouterr().err
    assert steps_in(incomplete) == [1]


def test_a_save_that_cannot_be_found_again_is_an_error(tmp_path, state, monkeypatch):
    """At the first save: whatever the reason, and though Orbax itself only logs it."""
    monkeypatch.setattr(scconv_jax.runs, "complete", lambda _: None)
    monkeypatch.setattr(OpenFolder, "plain", lambda folder: folder.path().resolve())
    (tmp_path / "run[1]").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"^the checkpoint of step 1 cannot be written: "),
        Checkpoints(tmp_path / "run[1]", keep=1) as checkpoints,
    ):
        checkpoints.save(at(state, 1))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("state/d", "cannot be written: "),
        ("state/_METADATA", "cannot be written: "),
        ("about/metadata", "cannot be written: .*No such file"),
        ("metrics", "cannot be written: the metrics are not found in .*/1$"),
        ("_CHECKPOINT_METADATA", "cannot be written: .*No such file"),
    ],
)
def test_whatever_is_lost_while_it_is_written_is_noticed(tmp_path, state, monkeypatch, lost, message):
    save = ocp.CheckpointManager.save

    def save_and_lose(manager, *arguments, **options):
        save(manager, *arguments, **options)
        path = tmp_path / "checkpoints" / "1" / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_and_lose)
    with pytest.raises(CheckpointError, match=message), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 1), {"eval/top1": 0.5})


def test_an_array_that_was_not_written_is_named(tmp_path, state, monkeypatch):
    shapes = scconv_jax.runs.shapes
    monkeypatch.setattr(
        scconv_jax.runs, "shapes", lambda path: {name: shape for name, shape in shapes(path).items() if name != "params/fc/bias"}
    )
    message = r"1 of \d+ arrays are not found in .*/1/state, among them params/fc/bias$"
    with pytest.raises(CheckpointError, match=message), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(state, 1))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux knows the new name of a folder")
def test_a_run_follows_its_folder(tmp_path, state):
    """Renamed before the first save, between two, and to a name with a pattern character."""
    (tmp_path / "old").mkdir()
    with Checkpoints(tmp_path / "old", keep=9) as checkpoints:
        assert checkpoints.workdir == tmp_path / "old"
        for step, name in enumerate(("new", "elsewhere[1]/new", "old"), 1):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            checkpoints.workdir.rename(tmp_path / name)
            checkpoints.save(at(state, step), {"eval/top1": 0.1 * step})
            checkpoints.wait()
            assert checkpoints.workdir == tmp_path / name
            assert steps_in(tmp_path / name) == [*range(1, step + 1)]
            assert_same(checkpoints.restore(state), at(state, step))
    assert checkpoints.workdir == tmp_path / "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere[1]", "old"]


def test_a_folder_that_was_removed_is_an_error(tmp_path, state):
    (tmp_path / "run").mkdir()
    with Checkpoints(tmp_path / "run", keep=9) as checkpoints:
        (tmp_path / "run").rmdir()
        checkpoints.save(at(state, 1))
        with pytest.raises(CheckpointError, match=r"^the checkpoint of step 1 cannot be written: .*No such file or dir.*/run"):
            checkpoints.wait()
    assert not (tmp_path / "run").exists()


def test_a_clock_that_jumps_does_not_change_what_is_kept(tmp_path, state, monkeypatch):
    for step, now in ((1, 2e9), (2, 1e9), (3, 3e9), (4, 0.0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(at(state, step), {"eval/top1": 0.1 * (step == 1)})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (steps_in(tmp_path), checkpoints.latest(), checkpoints.best()) == ([1, 3, 4], 4, 1)
        assert_same(checkpoints.restore(state), at(state, 4))


def test_other_classes_are_named(tmp_path, state):
    with Checkpoints(tmp_path, keep=1, classes=["cat", "dog", "fox"]) as checkpoints:
        checkpoints.save(at(state, 1))
    for classes, message in (
        (
            ["cat", "dog"],
            r"checkpoints/1 was trained on 3 classes, but the data set here has 2: .* start from its weights \(--init\)$",
        ),
        (
            ["cat", "dog", "emu"],
            "trained on other classes: class 2 is 'fox' there and 'emu' in the data set here, so the outputs",
        ),
    ):
        with Checkpoints(tmp_path, keep=1, classes=classes) as checkpoints, pytest.raises(ConfigError, match=message):
            checkpoints.restore(state)
    for classes in (["cat", "dog", "fox"], []):
        with Checkpoints(tmp_path, keep=1, classes=classes) as checkpoints:
            assert_same(checkpoints.restore(state), at(state, 1))


def test_the_latest_and_the_best_are_kept_across_restarts(tmp_path, state):
    for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.4), (4, 0.3), (5, 0.1)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(at(state, step), {"eval/top1": top1})
    assert steps_in(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 6))  # on a signal, there are no metrics
        checkpoints.wait()
        assert steps_in(tmp_path) == [2, 5, 6]
        checkpoints.save(at(state, 7), {"eval/top1": 0.9})
        checkpoints.wait()
        assert steps_in(tmp_path) == [6, 7], "of two equally good, the later is the best"


def test_saving_a_step_again_changes_nothing(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 3), {"eval/top1": 0.5})
        checkpoints.save(at(state, 3))
    assert steps_in(tmp_path) == [3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, state, value):
    broken = at(jax.tree.map(lambda x: x, state), 4)
    broken.params["fc"]["bias"] = broken.params["fc"]["bias"].at[3].set(value)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(broken)
        with pytest.raises(FloatingPointError, match=r"^params/fc/bias is not finite at step 4$"):
            checkpoints.wait()
        assert checkpoints.latest() is None


def test_no_checkpoint_is_an_error_that_says_where(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(ConfigError, match=f"^no checkpoint in {tmp_path}/"):
        checkpoints.restore(state)


def test_another_model_is_an_error_that_names_the_difference(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 3))
        other = init_state(Tiny(num_classes=7), OPTIMIZER, (8, 8, 3), seed=0)
        with pytest.raises(ConfigError, match=r"has another model; .*fc/bias is \(10,\) float32 in it, \(7,\) float32 here$"):
            checkpoints.restore(other)
        other = state.replace(ema={"params": state.params, "batch_stats": state.batch_stats})
        with pytest.raises(
            ConfigError, match=r"has another optimizer: keep optim.name, optim.freeze .* unchanged; ema/.* is absent in it"
        ):
            checkpoints.restore(other)
        other = state.replace(params={"conv": state.params["conv"]})
        with pytest.raises(ConfigError, match=r"has another model; params/bn/bias is \(8,\) float32 in it, absent here$"):
            checkpoints.restore(other)


def damages(path):
    """What may happen to a file: each with its name, done and undone."""
    content = path.read_bytes()
    middle = len(content) // 2
    yield "removed", path.unlink
    yield "cut off", lambda: path.write_bytes(content[:middle])
    yield "garbled", lambda: path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, state, capsys):
    """Whatever happens to one of its files: it is either of no consequence, or found, told, and nothing is lost."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(at(state, step), {"eval/top1": 0.1})
    like, found = jax.eval_shape(lambda: state), {}
    files = [path for path in sorted((tmp_path / "checkpoints" / "3").rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 8
    for path in files:
        for name, damage in damages(path):
            damage()
            with Checkpoints(tmp_path, keep=3) as checkpoints:
                restored = checkpoints.restore(like)
            told = capsys.readouterr().err
            step = int(restored.step)
            assert_same(restored, at(state, step))
            if step == 3:
                assert told == ""
            else:
                assert step == 2
                assert told.startswith("warning: the checkpoint of step 3 is damaged (")
                assert told.endswith("); using step 2 instead\n")
                assert told.count("\n") == 1
            found[name] = found.get(name, 0) + (step == 2)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert min(found.values()) >= 4, "the files that hold something"


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bits_flipped_in_an_array_are_found(tmp_path, state, capsys):
    """A checkpoint whose files are all in order, but which holds another number than was saved."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 1))
        checkpoints.save(at(state, 2))
        checkpoints.save(at(state, 3))
    about = tmp_path / "checkpoints" / "3" / "about" / "metadata"
    other = tmp_path / "checkpoints" / "2" / "about" / "metadata"
    about.write_bytes(other.read_bytes())  # as if the state were not what was written with it
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(state, repair=True)
        assert int(restored.step) == 2
        kept = tmp_path / "damaged" / "3"
        assert capsys.readouterr().err == (
            "warning: the checkpoint of step 3 is damaged (the checksum of step does not match); using step 2 instead. "
            f"It was moved to {kept}\n"
        )
        assert (kept / "state").is_dir()
        checkpoints.save(at(state, 3))  # the run comes to that step again
        checkpoints.wait()
        assert_same(checkpoints.restore(state), at(state, 3))


def test_where_all_are_damaged_nothing_is_touched(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 1))
        checkpoints.save(at(state, 2))
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step / "about" / "metadata").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(ConfigError) as raised:
        checkpoints.restore(state, repair=True)
    message = str(raised.value)
    assert message.startswith(f"all checkpoints in {tmp_path / 'checkpoints'} are damaged (step 2: ")
    assert "; step 1: " in message
    assert message.endswith("): restore one from a backup, or start a new run")
    assert "\n" not in message
    assert steps_in(tmp_path) == [1, 2]


def test_what_is_saved_is_the_state_of_that_moment(tmp_path, state):
    """The next step takes the memory of the state before; the checkpoint must not see it."""
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    current = jax.tree.map(jnp.copy, at(state, 1))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(current)
        for _ in range(20):
            current = step(current)
        jax.block_until_ready(current)
        assert_same(checkpoints.restore(state), at(state, 1))


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 1))
        checkpoints.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("a file in the way")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 2))
        with pytest.raises(CheckpointError, match=r"^the checkpoint of step 2 cannot be written: "):
            checkpoints.wait()


def test_after_an_error_the_threads_of_the_writer_are_not_heard(tmp_path, state, monkeypatch):
    """They complain of the event loop that went with the error, at any time until the process ends."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError), Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 1))
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore[arg-type]
    assert heard == ["something else"]


def test_a_damaged_step_that_was_asked_for_is_not_replaced(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(state, 1))
        checkpoints.save(at(state, 2))
        checkpoints.wait()
        (checkpoints.directory / "1" / "about" / "metadata").unlink()
        with pytest.raises(ConfigError, match=r"^the checkpoint of step 1 in .* is damaged: .*\. Other steps may be intact$"):
            checkpoints.restore(state, step=1)


def test_the_best_is_known(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best() is None
        for step, top1 in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.1)):
            checkpoints.save(at(state, step), {"eval/top1": top1})
        checkpoints.wait()
        assert (checkpoints.best(), checkpoints.latest()) == (3, 4)
        assert int(checkpoints.restore(state, step=3).step) == 3
