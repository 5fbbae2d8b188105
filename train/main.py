"""The command line: `python -m train.main [--config configs/NAME.py] [--field.name VALUE ...]`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

try:
    import tyro
    from tyro.conf import FlagCreatePairsOff, arg
except ModuleNotFoundError:
    print("error: the trainer needs more packages than the library: pip install -e '.[train]', or make setup", file=sys.stderr)
    sys.exit(2)

from train.config import DEFAULT, Config, ConfigError, load_config, shown
from train.workdir import check_same_run, fresh_workdir, holds_run, latest_workdir, load_run

PROGRAM = "python -m train.main"


@dataclass(frozen=True)
class Arguments:
    """Train a network, or go on training it, or test it.

    With no arguments: self-calibrated network on real handwritten digits, minutes on a CPU.
    """

    experiment: Annotated[Config, arg(name="")]
    config: Annotated[Path, arg(metavar="FILE")]
    """Experiment; the fields below override it."""
    workdir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/NAME, for configs/NAME.py)")]
    """Folder of the run."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Go on with the run in the workdir, by its own config unless --config is given. --resume DIR works too."""
    evaluate: Annotated[bool, arg(help_behavior_hint="")] = False
    """Only test the latest checkpoint of the run in the workdir."""


def parse(argv: Sequence[str]) -> tuple[Arguments, Path]:
    """The command line and the folder of the run.

    Raises:
        ConfigError: the config, the folder and the flags do not go together.
    """
    # Which run this is comes first: its config gives the defaults of all other flags.
    first = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--workdir", type=Path)
    first.add_argument("--resume", nargs="?", type=Path, const=True, default=False)
    first.add_argument("--evaluate", action="store_true")
    known, fields = first.parse_known_args(argv)

    workdir = known.resume if isinstance(known.resume, Path) else known.workdir
    name = (known.config or DEFAULT).stem
    if known.resume or known.evaluate:
        workdir = workdir or latest_workdir(name)
        before = load_run(workdir)
        base = load_config(known.config) if known.config else before
    else:
        workdir = workdir or fresh_workdir(name)
        before, base = None, load_config(known.config or DEFAULT)
    default = Arguments(base, known.config or Path(shown(str(DEFAULT))), known.workdir, bool(known.resume), known.evaluate)
    arguments = tyro.cli(Arguments, args=fields, default=default, prog=PROGRAM, config=(FlagCreatePairsOff,))

    if before is not None:
        for change in check_same_run(workdir, before, arguments.experiment):
            print(f"changed since the run began: {change}")
    elif holds_run(workdir):
        raise ConfigError(f"{workdir} holds a run already: add --resume to go on with it, or choose another --workdir")
    return arguments, workdir


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns its exit code: 0; 1, training failed; 2, a mistake in the command; 128 + signal."""
    try:
        arguments, workdir = parse(sys.argv[1:] if argv is None else argv)
        # Imported late, so that --help and mistakes take no time.
        from train import loop

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's and Grain's notes to developers
        if arguments.evaluate:
            loop.evaluate(arguments.experiment, workdir)
        elif signum := loop.train(arguments.experiment, workdir):
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
