"""The command line: `python -m train.main [DIR] [--config configs/NAME.py] [--field.name VALUE ...]`."""

import argparse
import logging
import sys
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

from train.config import CONFIGS, DEFAULT, Config, ConfigError, load_config
from train.workdir import check_same_run, fresh_workdir, holds_run, latest_workdir, load_run

PROGRAM = "python -m train.main"


IMAGENET = CONFIGS / "scnet50.py"
"""What a folder of images is trained by, where no config is given."""


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
    config: Annotated[Path, arg(metavar="FILE", help_behavior_hint="(default: configs/digits.py; with DIR, configs/scnet50.py)")]
    """Experiment; the fields below override it."""
    workdir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/NAME, for configs/NAME.py)")]
    """Folder of the run."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Go on with the run in the workdir, by its own config unless --config is given. --resume DIR works too."""
    evaluate: Annotated[bool, arg(aliases=("-e",), help_behavior_hint="")] = False
    """Only test the latest checkpoint of the run in the workdir."""
    pytorch: Annotated[FromPyTorch, arg(name="")] = FromPyTorch()
    images: Annotated[str, Positional, arg(metavar="DIR")] = ""
    """Folder of images, train/CLASS/… and val/CLASS/…, to train on: --data.name folder --data.dir DIR."""


def parse(argv: Sequence[str]) -> tuple[Config, Path | None, bool]:
    """The experiment, the folder of the run (None: of no run, but only of weights to test) and whether only to test.

    Raises:
        ConfigError: the config, the folder and the flags do not go together.
    """
    # Which run this is comes first: its config gives the defaults of all other flags.
    first = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--workdir", type=Path)
    first.add_argument("--resume", nargs="?", type=Path, const=True, default=False)
    first.add_argument("-e", "--evaluate", action="store_true")
    first.add_argument("--init")
    first.add_argument("--pretrained", action="store_const", dest="init", const="pretrained")
    first.add_argument("--dummy", action="store_true")
    first.add_argument("--no-accel", action="store_true")
    first.add_argument("--gpu", type=int)
    first.add_argument("--multiprocessing-distributed", action="store_true")
    first.add_argument("--dist-backend")
    known, fields = first.parse_known_args(argv)
    fields = [*fields, *(["--model.init", known.init] if known.init else [])]
    fields += ["--data.name", "synthetic", "--data.synthetic-classes", "1000"] if known.dummy else []

    def read(path: Path, base: Config) -> Arguments:
        default = Arguments(base, path, known.workdir, bool(known.resume), known.evaluate)
        return tyro.cli(Arguments, args=fields, default=default, prog=PROGRAM, config=(FlagCreatePairsOff,))

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
    arguments = read(path, before if before and not known.config else load_config(path))
    if arguments.images and not known.config and not before:
        path = IMAGENET
        arguments = read(path, load_config(path))

    _choose_devices(known.no_accel, known.gpu)
    for flag, given in (("multiprocessing-distributed", known.multiprocessing_distributed), ("dist-backend", known.dist_backend)):
        if given:
            print(f"--{flag} is of no use here: one process drives all devices of a host, and JAX knows how they talk")
    experiment = _on_images(arguments.experiment, arguments.images)
    if only_weights:
        return experiment, None, True
    workdir = workdir or fresh_workdir(path.stem)
    if before is not None:
        for change in check_same_run(workdir, before, experiment):
            print(f"changed since the run began: {change}")
    elif holds_run(workdir):
        raise ConfigError(f"{workdir} holds a run already: add --resume to go on with it, or choose another --workdir")
    return experiment, workdir, known.evaluate


def _on_images(experiment: Config, folder: str) -> Config:
    """The experiment on the images in `folder`, where one is given."""
    if not folder:
        return experiment
    name = experiment.data.name if experiment.data.name == "tfds" else "folder"
    return replace(experiment, data=replace(experiment.data, name=name, dir=folder))


def _choose_devices(no_accel: bool, gpu: int | None) -> None:
    """Say so to JAX before it looks for devices."""
    import jax

    if no_accel:
        jax.config.update("jax_platforms", "cpu")
    if gpu is not None:
        jax.config.update("jax_cuda_visible_devices", str(gpu))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns its exit code: 0; 1, training failed; 2, a mistake in the command; 128 + signal."""
    try:
        experiment, workdir, only_test = parse(sys.argv[1:] if argv is None else argv)
        # Imported late, so that --help and mistakes take no time.
        from train import loop

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's and Grain's notes to developers
        if only_test or workdir is None:
            loop.evaluate(experiment, workdir)
        elif signum := loop.train(experiment, workdir):
            return 128 + signum
    except FloatingPointError as error:
        print(f"error: {error}; the checkpoints before it are kept. A lower --optim.lr may help", file=sys.stderr)
        return 1
    except (ConfigError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped at once; nothing was saved since the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
