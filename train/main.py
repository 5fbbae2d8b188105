"""The command line: `python -m train.main [DIR] [--config configs/NAME.py] [--field.name VALUE ...]`."""

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

try:
    import tyro
    from tyro.conf import FlagCreatePairsOff, Positional, arg
except ModuleNotFoundError:
    print("error: the trainer needs more packages than the library: pip install -e '.[train]', or make setup", file=sys.stderr)
    sys.exit(2)

from train.config import CheckpointError, Config, ConfigError, Data, DivergedError, Hosts
from train.config.files import CONFIGS, DEFAULT, from_json, load_config, to_json
from train.distributed import Link, find
from train.run.workdir import check_same_run, fresh_workdir, holds_run, latest_workdir, load_run, refuse_held

PROGRAM = "python -m train.main"


IMAGENET = CONFIGS / "scnet50.py"
"""What a folder of images, or noise in its place, is trained by, where no config is given."""

ANYTHING = Config(epochs=10**9, data=Data(image_size=1))
"""A config that any other field fits."""


@dataclass(frozen=True)
class FromPyTorch:
    """Flags of PyTorch's ImageNet script; its -a, -b, -e, -j, -p, --lr, … stand with what they set here."""

    init: Annotated[str | None, arg(metavar="PATH")] = None
    """Short for --model.init. With --evaluate, and no run named, those weights are tested."""
    pretrained: bool = False
    """Short for --model.init pretrained."""
    dummy: bool = False
    """Noise of 1,000 classes in place of images: --data.name synthetic --data.synthetic-classes 1000."""
    no_accel: bool = False
    """Compute on the CPU, whatever else there is; as JAX_PLATFORMS=cpu does."""
    gpu: Annotated[int | None, arg(metavar="N")] = None
    """Use only this GPU of the machine."""
    multiprocessing_distributed: bool = False
    """Of no use here: one process drives all devices of a host."""
    dist_backend: Annotated[str | None, arg(metavar="NAME")] = None
    """Of no use here: JAX knows how its devices talk to each other."""


@dataclass(frozen=True)
class Arguments:
    """Train a network, or go on training it, or test it.

    With no arguments: self-calibrated network on real handwritten digits, minutes on a CPU.
    """

    experiment: Annotated[Config, arg(name="")]
    hosts: Hosts
    config: Annotated[Path, arg(metavar="FILE", help_behavior_hint="(default: configs/digits.py; with DIR, configs/scnet50.py)")]
    """Experiment; the fields below override it."""
    workdir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/NAME, for configs/NAME.py)")]
    """Folder of the run."""
    resume: Annotated[bool, FlagCreatePairsOff, arg(help_behavior_hint="")] = False
    """Go on with the run in the workdir, by its own config unless --config is given. --resume DIR works too."""
    evaluate: Annotated[bool, FlagCreatePairsOff, arg(aliases=("-e",), help_behavior_hint="")] = False
    """Only test the latest checkpoint of the run in the workdir."""
    best: Annotated[bool, FlagCreatePairsOff, arg(help_behavior_hint="")] = False
    """With --evaluate: the checkpoint of the best test accuracy, not the latest."""
    pytorch: Annotated[FromPyTorch, FlagCreatePairsOff, arg(name="")] = FromPyTorch()
    images: Annotated[str, Positional, arg(metavar="[DIR]")] = ""
    """Folder of images, train/CLASS/… and val/CLASS/…, to train on: --data.name folder --data.dir DIR. Or of a set of TFDS."""


def parse(argv: Sequence[str]) -> tuple[Config, Path | None, bool]:
    """The experiment, the folder of the run (None: of no run, but only of weights to test) and whether only to test.

    Raises:
        ConfigError: the config, the folder and the flags do not go together.
    """
    known, fields = first_pass(argv)
    fields = [*fields, *(["--model.init", known.init] if known.init else [])]
    fields += ["--data.name", "synthetic", "--data.synthetic-classes", "1000"] if known.dummy else []

    def read(path: Path, base: Config) -> Arguments:
        default = Arguments(base, _hosts(known), path, known.workdir, bool(known.resume), known.evaluate)
        return tyro.cli(Arguments, args=fields, default=default, prog=PROGRAM)

    def names_images() -> bool:
        """Whether DIR is among the flags; which config they must fit depends on it."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                return bool(read(DEFAULT, ANYTHING).images)
            except (SystemExit, ConfigError):
                return False  # the mistake is found again

    path, before = known.config or DEFAULT, None
    workdir = known.resume if isinstance(known.resume, Path) else known.workdir
    only_weights = known.evaluate and known.init and not known.resume and workdir is None
    if known.resume or (known.evaluate and not only_weights):
        if workdir is not None and workdir.is_file():
            raise ConfigError(
                f"{workdir} is a file, and a run is a folder; to begin with the weights of a file: --init {workdir}"
            )
        workdir = workdir or latest_workdir(path.stem)
        before = load_run(workdir)
    if not known.config and not before and (known.dummy or names_images()):
        path = IMAGENET
    arguments = read(path, before if before and not known.config else load_config(path))

    for flag, given in (("multiprocessing-distributed", known.multiprocessing_distributed), ("dist-backend", known.dist_backend)):
        if given:
            print(f"--{flag} is of no use here: one process drives all devices of a host, and JAX knows how they talk")
    experiment = _on_images(arguments.experiment, "" if known.dummy else arguments.images)
    if only_weights:
        return experiment, None, True
    workdir = workdir or fresh_workdir(path.stem)
    if before is not None:
        for change in check_same_run(workdir, before, experiment):
            print(f"changed since the run began: {change}")
    elif holds_run(workdir):
        refuse_held(workdir, experiment)
    return experiment, workdir, known.evaluate


def _on_images(experiment: Config, folder: str) -> Config:
    """The experiment on the images in `folder`, where one is given."""
    if not folder:
        return experiment
    prepared = experiment.data.name == "tfds" or (Path(folder) / "dataset_info.json").is_file()
    name = "tfds" if prepared else "folder"
    return replace(experiment, data=replace(experiment.data, name=name, dir=folder))


def _choose_devices(no_accel: bool, gpu: int | None) -> None:
    """Say so to JAX before it looks for devices."""
    import jax

    if no_accel:
        jax.config.update("jax_platforms", "cpu")
    if gpu is not None:
        jax.config.update("jax_cuda_visible_devices", str(gpu))


def first_pass(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that say which processes and which run these are; and the others, whose defaults that run's config gives."""
    first = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--workdir", type=Path)
    first.add_argument("--resume", nargs="?", type=Path, const=True, default=False)
    first.add_argument("-e", "--evaluate", action="store_true")
    first.add_argument("--best", action="store_true")
    first.add_argument("--init")
    first.add_argument("--pretrained", action="store_const", dest="init", const="pretrained")
    first.add_argument("--dummy", action="store_true")
    first.add_argument("--no-accel", action="store_true")
    first.add_argument("--gpu", type=int)
    first.add_argument("--multiprocessing-distributed", action="store_true")
    first.add_argument("--dist-backend")
    first.add_argument("--hosts.count", "--world-size", dest="hosts_count", type=int)
    first.add_argument("--hosts.index", "--rank", dest="hosts_index", type=int)
    first.add_argument("--hosts.address", "--dist-url", dest="hosts_address")
    first.add_argument("--hosts.timeout", dest="hosts_timeout", type=float, default=Hosts().timeout)
    return first.parse_known_args(argv)


def join(argv: Sequence[str]) -> Link:
    """Meet the other hosts, if there are any.

    Raises:
        ConfigError: they did not all come, or do not fit together.
    """
    known, fields = first_pass(argv)
    if {"-h", "--help"} & set(fields):
        return Link(Hosts(), [])
    _choose_devices(known.no_accel, known.gpu)
    hosts = find(_hosts(known))
    return Link(hosts, [f"{name}={value}" for name, value in vars(known).items() if name not in ("hosts_index", "gpu")] + fields)


def _hosts(known: argparse.Namespace) -> Hosts:
    """The processes that train together, as the flags give them."""
    address = known.hosts_address and known.hosts_address.removeprefix("tcp://")
    return Hosts(count=known.hosts_count, index=known.hosts_index, address=address, timeout=known.hosts_timeout)


def run(argv: Sequence[str], link: Link) -> int:
    """Do what the command line says: host 0 reads it, and the others do as host 0 does, in silence."""
    what = None
    if link.index == 0:
        experiment, workdir, only_test = parse(argv)
        what = [to_json(experiment), workdir and str(workdir), only_test, first_pass(argv)[0].best]
    else:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 for the rest of the process
    text, folder, only_test, best = link.share(what)
    link.check_name()
    # Imported late, so that --help and mistakes take no time.
    from train import loop

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's and Grain's notes; their errors are raised, too
    experiment = from_json(text, "the config of host 0")
    if only_test or folder is None:
        loop.evaluate(experiment, folder and Path(folder), best)
        return 0
    signum = loop.train(experiment, Path(folder))
    return 128 + signum if signum else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns its exit code: 0; 1, training failed; 2, a mistake in the command; 128 + signal.

    With several hosts, an error ends the processes of all, with the same code.
    """
    argv = sys.argv[1:] if argv is None else argv
    link = None
    try:
        with join(argv) as link:
            return run(argv, link)
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
        if isinstance(error, BrokenPipeError):  # `| head`: silent, as other programs are, also in Python's last flush
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 for the rest of the process
        elif not reason:
            raise
        return code


def explain(error: BaseException) -> tuple[str, int]:
    """What to print of an error, and the exit code; an empty text for one that only a traceback explains."""
    match error:
        case FloatingPointError():
            return f"error: {error}; the checkpoints before it are kept. A lower --optim.lr may help", 1
        case ConfigError() | ModuleNotFoundError():
            return f"error: {error}", 2
        case CheckpointError() | DivergedError():
            return f"error: {error}; the checkpoints written before are kept", 1
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"error: {error.strerror}: {error.filename or 'the workdir'}; the checkpoints written before are kept", 1
        case KeyboardInterrupt():
            return "Stopped at once; nothing was saved since the last checkpoint.", 130
        case BrokenPipeError():
            return "", 128 + signal.SIGPIPE
        case SystemExit():
            return "", error.code if isinstance(error.code, int) else 1
    return "", 1


if __name__ == "__main__":
    sys.exit(main())
