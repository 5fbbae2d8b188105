"""The trainer's command line: `python -m train.main [DIR] [--config configs/NAME.py] [--field.name VALUE ...]`."""

import errno
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

try:
    from train.config.flags import Flags, parse_flags, print_help
except ModuleNotFoundError:
    print("error: the trainer needs more packages than the library: pip install -e '.[train]', or make setup", file=sys.stderr)
    sys.exit(2)

from train.config import CheckpointError, Config, ConfigError, DivergedError
from train.config.files import (
    DEFAULT,
    IMAGENET,
    check_utf8,
    from_json,
    load_config,
    local_path,
    override,
    to_json,
    with_absolute_paths,
)
from train.distributed import HostLink, find_hosts
from train.run.workdir import check_same_run, fresh_workdir, holds_run, latest_workdir, load_run, refuse_existing_run
from train.streams import mend_streams, silence


def parse(argv: Sequence[str]) -> Flags:
    """Parse a command line with `parse_flags`; for --help, print the help and exit."""
    flags = parse_flags([word for word in argv if word not in ("-h", "--help")])
    if {"-h", "--help"} & set(argv):
        print_help(_find_base(flags)[0])
    return flags


def plan_run(flags: Flags) -> tuple[Config, Path | None]:
    """Return the experiment and the folder of the run, which is None if only the weights of `model.init` are tested."""
    for name in {"multiprocessing_distributed", "dist_backend"} & flags.given.keys():
        flag = name.replace("_", "-")
        print(f"--{flag} has no effect: one process drives all devices of a host, and JAX chooses how they communicate")
    base, path, workdir, resumed = _find_base(flags)
    experiment = with_absolute_paths(_with_images(override(base, flags.given), flags))
    if flags.evaluate and not resumed:
        return experiment, None
    workdir = workdir or fresh_workdir(path.stem)
    check_utf8(workdir, "--workdir")
    if resumed:
        images, on_disk = experiment.data.dir, experiment.data.name in ("folder", "tfds")
        if on_disk and images == resumed.data.dir and not Path(images).is_dir():
            raise ConfigError(
                f"the images of {workdir} were in {images}, where there is no folder now: name their new folder, as in "
                f"python -m train.main DIR --workdir {shlex.quote(str(workdir))} --{'evaluate' if flags.evaluate else 'resume'}"
            )
        for change in check_same_run(workdir, resumed, experiment):
            print(f"changed since the run began: {change}")
    elif holds_run(workdir):
        refuse_existing_run(workdir, experiment)
    return experiment, workdir


def _find_base(flags: Flags) -> tuple[Config, Path, Path | None, Config | None]:
    """Return the config that the flags override, its file, the workdir (None if unknown) and the config of a resumed run."""
    path = flags.config or (IMAGENET if flags.images or flags.dummy else DEFAULT)
    workdir, resumed = flags.workdir and local_path(flags.workdir, "--workdir"), None
    if flags.resume or (flags.evaluate and (workdir or "model.init" not in flags.given)):
        if workdir and workdir.is_file():
            raise ConfigError(
                f"{workdir} is a file, and a run is a folder; to start from the weights in a file: --init {workdir}"
            )
        workdir = workdir or latest_workdir(path.stem)
        resumed = with_absolute_paths(load_run(workdir))
    return (resumed if resumed and not flags.config else load_config(path)), path, workdir, resumed


def _with_images(experiment: Config, flags: Flags) -> Config:
    """Return the experiment on the images that DIR or --dummy names, if one of them is given."""
    data = experiment.data
    if flags.dummy:
        data = replace(data, name="synthetic", synthetic_classes=1000)
    elif flags.images:
        is_tfds = data.name == "tfds" or (Path(flags.images) / "dataset_info.json").is_file()
        data = replace(data, name="tfds" if is_tfds else "folder", dir=flags.images)
    return replace(experiment, data=data)


def join(flags: Flags) -> HostLink:
    """Choose the devices of this process and connect to the other hosts, if there are any."""
    import jax

    if flags.no_accel:
        jax.config.update("jax_platforms", "cpu")
    if flags.gpu is not None:
        jax.config.update("jax_cuda_visible_devices", str(flags.gpu))
    hosts = replace(flags.hosts, address=flags.hosts.address and flags.hosts.address.removeprefix("tcp://"))
    same = [f"{name} {value}" for name, value in flags.given.items() if name not in ("hosts.index", "gpu")]
    return HostLink(find_hosts(hosts), same)


def run(flags: Flags, link: HostLink) -> int:
    """Train or test. Host 0 reads the config and sends it to the other hosts, which print nothing."""
    plan = None
    if link.index == 0:
        experiment, workdir = plan_run(flags)
        plan = [to_json(experiment), workdir and str(workdir)]
    else:
        silence("stdout")
    text, folder = link.share(plan)
    # Imported late, so that mistakes in the command are reported before these slow imports.
    import jax

    import scconv_jax
    from train import devices, loop

    logging.basicConfig(format="warning: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax and Grain log what they also raise
    devices.check_accelerator()
    if flags.no_compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    scconv_jax.keep_programs()
    link.check_name()
    experiment, workdir = from_json(text, "the config of host 0"), folder and Path(folder)
    if flags.evaluate or workdir is None:
        loop.evaluate(experiment, workdir, "latest" if flags.latest else flags.checkpoint)
        return 0
    signum = loop.train(experiment, workdir)
    return 128 + signum if signum else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line as `command` does, and end the process if reads hang, for which Python's exit would wait."""
    mend_streams()
    try:
        code = command(argv)
    except BaseException:
        if not _reads_hang():
            raise
        traceback.print_exc()
        code = 1
    if _reads_hang():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _reads_hang() -> bool:
    from train.data.batches import reads_hang  # late: it imports NumPy

    return reads_hang()


def command(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 (training failed), 2 (a mistake in the command) or 128 + signal.

    If there are several hosts, an error ends the processes of all with the same code.
    """
    link = None
    try:
        flags = parse(sys.argv[1:] if argv is None else argv)
        with join(flags) as link:
            return run(flags, link)
    except BaseException as error:
        if link is not None and isinstance(error, RuntimeError):
            link.wait_for_reason()
        reason, code = explain(error)
        if reason:
            print(reason, file=sys.stderr)
        elif link is not None and link.count > 1:
            traceback.print_exc()
        if link is not None:
            link.fail((reason or f"{type(error).__name__}: {error}").removeprefix("error: ").splitlines()[0], code)
        if isinstance(error, BrokenPipeError):  # `| head`: silent, like other programs, also in Python's last flush
            silence("stdout")
        elif not reason:
            raise
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line to print for an error and the exit code; the line is empty if only a traceback can explain the error."""
    match error:
        case FloatingPointError():
            return f"error: {error}; the checkpoints before it are kept. A lower --optim.lr may help", 1
        case ConfigError() | ModuleNotFoundError():
            return f"error: {error}", 2
        case CheckpointError() | DivergedError():
            return f"error: {error}; the checkpoints written before are kept", 1
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"error: {error.strerror}: {error.filename or 'the workdir'}; the checkpoints written before are kept", 1
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
            reason = str(error).splitlines()[0].rstrip(".")
            cures = "fewer images (--data.batch-size), --optim.accumulate and --model.rematerialise need less"
            return f"error: a device has too little memory: {reason}; {cures}; the checkpoints written before are kept", 1
        case KeyboardInterrupt():
            return "Stopped at once; nothing was saved since the last checkpoint.", 130
        case BrokenPipeError():
            return "", 128 + signal.SIGPIPE
        case SystemExit():
            return "", error.code if isinstance(error.code, int) else 1
    return "", 1


if __name__ == "__main__":
    sys.exit(main())
