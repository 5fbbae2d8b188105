"""The flags of `python -m train.main`. tyro parses them once; names from PyTorch's ImageNet script are replaced first."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

from train.config.fields import ConfigError
from train.config.files import flatten
from train.config.schema import Config, Data, Hosts

PROGRAM = "python -m train.main"

SHORT_NAMES = {
    "-a, --arch": "--model.name",
    "--init": "--model.init",
    "--pretrained": "--model.init pretrained",
    "-b, --batch-size": "--data.batch-size",
    "-j, --workers": "--data.threads",
    "--opt": "--optim.name",
    "--lr, --learning-rate": "--optim.lr",
    "--momentum": "--optim.momentum",
    "--wd, --weight-decay": "--optim.weight-decay",
    "-p, --print-freq": "--log-every",
    "--profile-steps": "--log.profile-steps",
    "-e": "--evaluate",
    "--world-size": "--hosts.count",
    "--rank": "--hosts.index",
    "--dist-url": "--hosts.address",
}
"""Short names, most of them from PyTorch's ImageNet script, and the flags that replace them."""
FULL_NAMES = {short: full for names, full in SHORT_NAMES.items() for short in names.split(", ")}

DESCRIPTION = """Train a network, resume a run, or test a network.

Without arguments: train a self-calibrated network on real handwritten digits, in minutes on a CPU.

Short names, as in PyTorch's ImageNet script:
""" + "\n".join(f"  {names:<24}{full}" for names, full in SHORT_NAMES.items())

PERMISSIVE = Config(epochs=10**9, data=Data(image_size=1))
"""Defaults during parsing. Any valid value of one field is compatible with them."""

Switch = Annotated[bool, FlagCreatePairsOff, arg(help_behavior_hint="")]


@dataclass(frozen=True)
class Flags:
    """The parsed command line."""

    experiment: Annotated[Config, arg(name="")]
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
    config: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: configs/digits.py; with DIR, configs/scnet50.py)")
    ] = None
    """Config file; the flags below override its fields."""
    workdir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/NAME for configs/NAME.py)")] = None
    """Folder of the run."""
    resume: Switch = False
    """Resume the run in the workdir, with its own config unless --config is given. Or: --resume DIR."""
    evaluate: Switch = False
    """Only test the best checkpoint in the workdir or, with --model.init and without --workdir, those weights."""
    latest: Switch = False
    """The same as --checkpoint latest."""
    checkpoint: Annotated[str, arg(metavar="best|latest|STEP")] = "best"
    """With --evaluate: the checkpoint to test. best has the highest test accuracy; it is the latest if none was tested."""
    best: Switch = False
    """Accepted without effect: --evaluate tests the best checkpoint."""
    dummy: Switch = False
    """Random images of 1,000 classes: --data.name synthetic --data.synthetic-classes 1000, regardless of DIR."""
    no_accel: Switch = False
    """Compute on the CPU even if there is an accelerator, as with JAX_PLATFORMS=cpu."""
    gpu: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Use only this GPU of the machine."""
    no_compile_cache: Switch = False
    """Do not keep compiled programs in ~/.cache/scconv_jax/programs, which later runs start faster with."""
    multiprocessing_distributed: Switch = False
    """Accepted without effect: one process drives all devices of a host."""
    dist_backend: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Accepted without effect: JAX chooses how devices communicate."""
    images: Annotated[str, Positional, arg(metavar="[DIR]", help_behavior_hint="")] = ""
    """Images to train on: a folder with train/CLASS/… and val/CLASS/…, or a TFDS data set. Sets --data.name and --data.dir."""
    given: Annotated[dict[str, Any], Fixed, Suppress] = dataclasses.field(default_factory=dict)
    """Not a flag: the given flags and their values, such as `{"optim.lr": 0.1}`."""


def parse_flags(argv: Sequence[str]) -> Flags:
    """Parse a command line without --help. Fields without a flag have placeholders.

    Raises:
        ConfigError: A flag is unknown, or its value is out of range.
        SystemExit: A value is missing or has the wrong type; tyro has printed which.
    """
    words = expand(argv)
    flags, unknown = tyro.cli(
        Flags, args=words, default=Flags(PERMISSIVE), prog=PROGRAM, description=DESCRIPTION, return_unknown_args=True
    )
    values = dataclasses.asdict(flags)
    values = flatten(values.pop("experiment") | values)
    if unknown:
        raise ConfigError(_describe_unknown(unknown[0], [*FULL_NAMES, *("--" + name.replace("_", "-") for name in values)]))
    named = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}

    def is_given(name: str) -> bool:
        group, dot, field = name.rpartition(".")
        return name in named or f"{group}{dot}no_{field}" in named or (name == "images" and flags.images != "")

    return dataclasses.replace(flags, given={name: value for name, value in values.items() if is_given(name)})


def print_help(config: Config) -> None:
    """Print the help, with `config` as defaults, and exit."""
    tyro.cli(Flags, args=["--help"], default=Flags(config), prog=PROGRAM, description=DESCRIPTION)


def expand(argv: Sequence[str]) -> list[str]:
    """Replace short names by full ones, and `--resume DIR` by `--resume --workdir DIR`."""
    words: list[str] = []
    for word, following in itertools.pairwise([*argv, "-"]):
        if attached := re.fullmatch(r"(-[abjp])([^=].*)", word):  # -b256
            word = "=".join(attached.groups())
        name, equals, value = word.partition("=")
        full = FULL_NAMES.get(name.replace("_", "-"))
        if name == "--resume" and (equals or not following.startswith("-")):
            full = "--resume --workdir"
        words += [*full.split(), *([value] if equals else [])] if full else [word]
    return words


def _describe_unknown(word: str, known: list[str]) -> str:
    import scconv_jax  # loads JAX, so only after a mistake

    if not word.startswith("-"):
        return f"unexpected argument {word!r}: only one DIR can be given"
    name = word.partition("=")[0]
    hint = scconv_jax.messages.did_you_mean(name, known, most=2, cutoff=0.7)
    return f"there is no flag {name}.{hint} All flags: {PROGRAM} --help"
