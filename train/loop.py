"""The training loop and the evaluation of a checkpoint."""

import contextlib
import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from optax.tree_utils import tree_size

import scconv_jax
from train.config import Config, ConfigError, make_plan
from train.data.batches import DevicePrefetcher, StoppedError, train_batches
from train.devices import check_memory
from train.distributed import Signals
from train.initial_state import InitialState
from train.optim import make_optimizer, make_schedule
from train.parallel import from_host_0
from train.run.checkpoints import Checkpoints
from train.run.curves import draw_curves
from train.run.metrics import Metrics, MetricsWindow, best_line, epochs_without_progress, read_metrics
from train.run.profiler import Profiler, peak_multiply_adds, training_multiply_adds
from train.run.progress import Progress
from train.run.trackers import check_trackers, open_trackers
from train.run.workdir import holds_run, locked_folder, save_config
from train.setup import TrainingSetup, make_setup, make_step, make_test, save_record

CURVES_SECONDS = 2.0
"""Least time between two drawings of curves.png, so that short epochs are not held up."""
SLOW_INPUT_WARNING = (
    "warning: the devices wait for data (see waiting_for_data in metrics.jsonl); more --data.threads or a faster disk may help"
)


def train(config: Config, workdir: Path) -> int:
    """Train to the last epoch, from the latest checkpoint in `workdir` if there is one.

    Returns:
        0, or the number of the signal (Ctrl-C, SIGTERM) that stopped the run. Its state is then saved.

    Raises:
        ConfigError: The config does not fit the data, the devices or the checkpoint.
        FloatingPointError: The loss or the state is not finite. Such a state is not saved.
        CheckpointError: A checkpoint cannot be written.
        DivergedError: Two devices hold different states.
    """
    began = time.perf_counter()
    setup = make_setup(config, begins=not holds_run(workdir))
    batch_size, images = config.data.batch_size, len(setup.dataset.train)
    devices = jax.device_count()
    plan = make_plan(config, images, devices)
    if config.log.profile_steps and config.log.profile_steps[0] > plan.total_steps:
        raise ConfigError(
            f"log.profile_steps starts at step {config.log.profile_steps[0]}, but the run has {plan.total_steps} steps"
        )
    is_host_0 = jax.process_index() == 0
    title, drawn = f"{config.model.name} on {config.data.name}", began
    written = workdir if is_host_0 else None  # host 0 alone reads and writes the workdir
    if is_host_0:
        check_trackers(config.log)

    schedule = make_schedule(config.optim, plan)
    optimizer = make_optimizer(config.optim, schedule, setup.frozen)
    start = InitialState(config, plan, setup.model, optimizer, setup.dataset.image_shape)
    next_state, test = make_step(setup, config, optimizer), make_test(setup, config)

    with (
        locked_folder(written),
        Checkpoints(written, config.keep_checkpoints, dataclasses.asdict(config), images, setup.dataset.classes) as checkpoints,
        Signals() as signals,
    ):
        state, notes = start.placeholder(), []
        if resumes := checkpoints.latest() is not None:
            state = checkpoints.restore(start.shapes(), repair=True)
            notes = resume_notes(config, checkpoints.devices)
        elif is_host_0:
            state, notes = start.create()
        state = from_host_0(state)
        first_step, step, completed = int(state.step), int(state.step), False
        print(
            f"{config.model.name} ({tree_size(state.params):,} parameters) on {describe_devices()}; {config.data.name}, "
            f"{setup.dataset.num_classes} classes: {config.epochs} epoch{'s' * (config.epochs != 1)} of "
            f"{plan.steps_per_epoch} step{'s' * (plan.steps_per_epoch != 1)} of {batch_size} images."
            f" Writing to {workdir}" + (f", resuming from step {step} of {plan.total_steps}" if resumes else ""),
            *notes,
            sep="\n",
            flush=True,
        )
        state = setup.parallel.put_state(state)
        check_memory(config, setup, optimizer, state, next_state)
        trackers = ()
        if is_host_0:
            trackers = open_trackers(config.log, workdir, first_step, dataclasses.asdict(config))
            save_config(workdir, config)
            save_record(workdir, config, setup)
        batches = train_batches(
            setup.dataset.train,
            batch_size,
            seed=config.seed,
            first_step=step,
            threads=config.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with (
            DevicePrefetcher(batches, setup.parallel.put_batch, signals.stopping) as prefetcher,
            Metrics(written and written / "metrics.jsonl", first_step, trackers, began=began) as metrics,
            Profiler(config.log.profile_steps if is_host_0 else (), workdir / "profile") as profiler,
            Progress(plan.total_steps, first_step, batch_size, shown=is_host_0) as progress,
            contextlib.suppress(StoppedError),  # a signal has come while a batch was expected
        ):
            window = MetricsWindow(
                batch_size,
                waited=lambda: prefetcher.waited,
                multiply_adds=training_multiply_adds(setup.model, setup.dataset.image_shape),
                peak=peak_multiply_adds(jax.devices()),
            )
            train_metrics = {}

            def is_stale() -> bool:
                waits = config.patience and is_host_0 and epochs_without_progress(checkpoints.workdir) >= config.patience
                return bool(config.patience and from_host_0(np.int32(waits)))

            def end_epoch(epoch: int) -> None:
                test_metrics = test(state, signals.stopping)
                if not np.isfinite(test_metrics["eval/loss"]):
                    raise FloatingPointError(f"the test loss is {test_metrics['eval/loss']} at step {step}")
                metrics.write(step, epoch=epoch, **test_metrics)
                checkpoints.save(state, test_metrics)
                progress.say(epoch_line(epoch, config.epochs, train_metrics | test_metrics))
                nonlocal drawn
                if is_host_0 and time.perf_counter() - drawn > CURVES_SECONDS:
                    run = checkpoints.workdir  # the folder may have been renamed
                    with contextlib.suppress(OSError):  # on a full disk, the error of the checkpoint says more
                        draw_curves(run / "metrics.jsonl", run / "curves.png", title=title)
                    drawn = time.perf_counter()
                window.restart_clock()

            epoch, position = divmod(step, plan.steps_per_epoch)
            untested = resumes and position == 0 and step > plan.first_step and not checkpoints.is_tested(step)
            if from_host_0(np.int32(untested)):  # a signal stopped the test
                end_epoch(epoch)
            stop, stale = signals.stop_after(step), is_stale()
            while step < plan.total_steps and not stop and not stale:
                profiler.before(step + 1)
                state, values = next_state(state, prefetcher.take(window.idle))
                step += 1
                stop = signals.stop_after(step)
                if profiler.after(step, values):
                    first, last = config.log.profile_steps
                    progress.say(f"wrote the profile of steps {first} to {last} to {workdir / 'profile'}")
                window.add(step, values)
                if step == first_step + 1:
                    jax.block_until_ready(values)  # the first step compiles
                    window.restart_clock()
                    progress.restart_clock()
                epoch, position = divmod(step, plan.steps_per_epoch)
                progress.advance(f"epoch {min(epoch + 1, config.epochs)}/{config.epochs}")

                save = position != 0 and config.checkpoint_every > 0 and step % config.checkpoint_every == 0
                if step % config.log_every == 0 or position == 0 or save or stop:
                    train_metrics = window.close()
                    lr = np.asarray(schedule(step - 1)).item()
                    metrics.write(step, epoch=round(step / plan.steps_per_epoch, 3), lr=lr, **train_metrics)
                    checkpoints.check()
                    if window.slow_input:
                        progress.say(SLOW_INPUT_WARNING, once=True)
                if devices > 1 and config.check_every > 0 and step % config.check_every == 0:
                    setup.parallel.check_same(state, step)
                if save:
                    checkpoints.save(state)
                if position == 0:  # the end of an epoch
                    end_epoch(epoch)
                    stale = is_stale()
            completed = step == plan.total_steps or stale
        checkpoints.save(state)

    if not is_host_0:
        return 0 if completed else signals.received
    workdir = checkpoints.workdir
    draw_curves(workdir / "metrics.jsonl", workdir / "curves.png", title=title)
    if not completed:
        print(
            f"Stopped and saved at step {step} of {plan.total_steps}. To resume: "
            f"python -m train.main --workdir {shlex.quote(str(workdir))} --resume"
        )
        return signals.received
    if step < plan.total_steps:
        print(
            f"Ended after epoch {step // plan.steps_per_epoch} of {config.epochs}: no better test accuracy for {config.patience} "
            f"epoch{'s' * (config.patience > 1)} (patience)"
        )
    print(summary(workdir, metrics.seconds))
    if config.log.report:
        print(try_report(config, workdir, setup))
    return 0


def evaluate(config: Config, workdir: Path | None, checkpoint: str | int = "best") -> None:
    """Test a checkpoint in `workdir`, or the weights of `model.init` if it is None, and print the result."""
    setup = make_setup(config, testing=True, begins=workdir is None)
    start = start_for_test(config, setup)
    state = start.placeholder()
    if jax.process_index() == 0 and workdir is None:
        state, notes = start.create()
        if untrained := [note for note in notes if "keeps its initial values" in note]:
            raise ConfigError(f"model.init {config.model.init!r} cannot be tested on these images. {untrained[0]}")
        print(*notes, sep="\n")
    elif jax.process_index() == 0 and workdir is not None:
        state, said = restore_for_test(config, setup, workdir, checkpoint)
        print(f"Testing {said}")
    state = from_host_0(state)
    result = make_test(setup, config)(setup.parallel.put_state(state))
    print(
        f"{config.model.name} on {config.data.name}, step {int(state.step)}: test accuracy "
        f"{accuracy(result)}, "
        + (f"top-5 {result['eval/top5']:.2%}, " if "eval/top5" in result else "")
        + f"loss {result['eval/loss']:.4f}"
    )


def start_for_test(config: Config, setup: TrainingSetup) -> InitialState:
    """Return what makes the initial state and its shapes. A test needs no full batch of training images."""
    images = max(len(setup.dataset.train), config.data.batch_size)
    plan = make_plan(config, images, jax.device_count())
    optimizer = make_optimizer(config.optim, make_schedule(config.optim, plan), setup.frozen)
    return InitialState(config, plan, setup.model, optimizer, setup.dataset.image_shape)


def restore_for_test(config: Config, setup: TrainingSetup, workdir: Path, checkpoint: str | int) -> tuple[Any, str]:
    """Return the state of a checkpoint, which `scconv_jax.runs.choose_step` chooses, and which one it is, in words."""
    with Checkpoints(workdir, config.keep_checkpoints, classes=setup.dataset.classes) as checkpoints:
        best, latest = checkpoints.best(), checkpoints.latest()
        try:
            step = scconv_jax.runs.choose_step(checkpoints.directory, checkpoint)
        except scconv_jax.WeightsError as error:
            raise ConfigError(f"{workdir} cannot be tested: {error}") from error
        is_latest = checkpoint == "latest" or best is None
        # If the latest is damaged, the one before is taken.
        state = checkpoints.restore(start_for_test(config, setup).shapes(), step=None if is_latest and step == latest else step)
    if checkpoint not in ("best", "latest"):
        return state, f"the checkpoint of step {step}."
    if is_latest:
        return state, "the latest checkpoint" + (f" (the best, of step {best}, without --latest)." if best is not None else ".")
    return state, f"the best checkpoint (--latest: that of step {latest})."


def report(
    config: Config,
    workdir: Path,
    checkpoint: str | int = "best",
    setup: TrainingSetup | None = None,
) -> Path:
    """Test a checkpoint in `workdir`, write its report and return the path of the page.

    Args:
        config: The run's config.
        workdir: The run's folder.
        checkpoint: "best", "latest" or a step.
        setup: The run's data, network and devices. If None, they are made.
    """
    from train.report.results import make_results
    from train.report.write import write_report

    if setup is None:
        setup = make_setup(config, testing=config.data.name in ("folder", "tfds"))
        if not (workdir / scconv_jax.runs.RECORD).exists():
            save_record(workdir, config, setup)
    state, _ = restore_for_test(config, setup, workdir, checkpoint)
    results = make_results(setup, config)(setup.parallel.put_state(state))
    step = int(state.step)
    best = scconv_jax.runs.best_step(workdir)
    kind = "best checkpoint" if step == best else "latest checkpoint" if checkpoint == "latest" or best is None else "checkpoint"
    return write_report(workdir, config, setup.dataset, results, step=step, checkpoint=f"{kind}, step {step:,}")


def try_report(config: Config, workdir: Path, setup: TrainingSetup) -> str:
    """Write the report of a finished run and return a line about it. A failure is no failure of the run."""
    again = f"python -m train.report {shlex.quote(str(workdir))}"
    if jax.process_count() > 1:
        return f"No report was written, because the run has several hosts. One machine writes it: {again}"
    try:
        return f"Report: {report(config, workdir, setup=setup)}"
    except Exception as error:  # of any kind: the network is trained
        return f"warning: no report was written ({type(error).__name__}: {error!s:.300}). To try again: {again}"


def resume_notes(config: Config, devices_before: int) -> list[str]:
    """Return notes for the user about a resumed run."""
    devices, notes = jax.device_count(), []
    if devices_before != devices:
        notes.append(
            f"The run began on {devices_before} devices and resumes on {devices}: results agree to rounding, not bit for bit."
        )
    if config.model.init:
        notes.append(f"The weights are those of the checkpoint; model.init {config.model.init!r} is not loaded again.")
    return notes


def epoch_line(epoch: int, epochs: int, values: dict[str, float]) -> str:
    """Return the line to print after an epoch."""
    return (
        f"epoch {epoch:{len(str(epochs))}}/{epochs}   "
        + (f"train loss {values['train/loss']:.4f}, accuracy {values['train/top1']:7.2%}   " if "train/loss" in values else "")
        + f"test loss {values['eval/loss']:.4f}, accuracy {values['eval/top1']:7.2%}"
        + (f"   {values['images_per_second']:,.0f} img/s" if "images_per_second" in values else "")
    )


def summary(workdir: Path, seconds: float | None) -> str:
    """Return the line to print at the end of a run. `seconds` is the time of training, if known."""
    tested = [line for line in read_metrics(workdir / "metrics.jsonl") if "eval/top1" in line]
    if not tested:  # a finished run whose metrics were lost
        return f"No test result in {workdir / 'metrics.jsonl'}. The checkpoints are complete; --evaluate tests the best"
    last, best, took = tested[-1], best_line(tested), "" if seconds is None else f"; {seconds:.0f} s"
    return (
        f"Test accuracy {accuracy(last)} after the last epoch, "
        f"{best['eval/top1']:.2%} at best (epoch {best['epoch']}){took}. Curves: {workdir / 'curves.png'}"
    )


def accuracy(tested: dict[str, Any]) -> str:
    """Return the accuracy as text: `98.61 % (355 of 360)`."""
    share, images = tested["eval/top1"], tested["eval/images"]
    return f"{100 * share:.2f} % ({round(share * images)} of {images})"


def describe_devices() -> str:
    """Return the devices as text: `1 × cpu` or `16 × NVIDIA H200 of 2 hosts`."""
    devices, hosts = jax.devices(), jax.process_count()
    return f"{len(devices)} × {devices[0].device_kind}" + (f" of {hosts} hosts" if hosts > 1 else "")
