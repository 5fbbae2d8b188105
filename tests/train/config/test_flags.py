"""Every flag of PyTorch's ImageNet script (pytorch/examples, imagenet/main.py) and what it does here: docs/from_pytorch.md."""

import re
from pathlib import Path

import jax
import pytest

from train import main
from train.config import ConfigError, Hosts
from train.main import join, parse

PAGE = Path(__file__).parents[3] / "docs" / "from_pytorch.md"

ROWS = {
    "DIR": (["images"], {"data.name": "folder", "data.dir": "images", "model.name": "scnet50", "data.image_size": 224}),
    "-a, --arch": (["--arch", "resnet50"], {"model.name": "resnet50"}),
    "-j, --workers": (["-j", "7"], {"data.threads": 7}),
    "--epochs": (["--epochs", "90"], {"epochs": 90}),
    "--start-epoch": (["--start-epoch", "3"], {"start_epoch": 3}),
    "-b, --batch-size": (["-b", "128"], {"data.batch_size": 128}),
    "--lr, --learning-rate": (["--lr", "0.3"], {"optim.lr": 0.3}),
    "--momentum": (["--momentum", "0.8"], {"optim.momentum": 0.8}),
    "--wd, --weight-decay": (["--wd", "3e-5"], {"optim.weight_decay": 3e-5}),
    "-p, --print-freq": (["-p", "10"], {"log_every": 10}),
    "--pretrained": (["-a", "scnet50", "--pretrained"], {"model.init": "pretrained"}),
    "--seed": (["--seed", "5"], {"seed": 5}),
    "--dummy": (["--dummy"], {"data.name": "synthetic", "data.synthetic_classes": 1000, "data.image_size": 224}),
}
"""Row of the table → (command line, fields that it sets)."""
ACTIONS = ["--resume", "-e, --evaluate", "--gpu", "--no-accel", "--multiprocessing-distributed", "--dist-backend"]
"""Rows that set no field; a test each below."""
HOSTS = ["--world-size", "--rank", "--dist-url"]

OTHER_SPELLINGS = [
    ["-a", "resnet50"],
    ["-a=resnet50"],
    ["--model.name", "resnet50"],
    ["--workers", "7"],
    ["--batch-size", "128"],
    ["--batch-size=128"],
    ["--learning-rate", "0.3"],
    ["--weight-decay", "3e-5"],
    ["--print-freq", "10"],
    ["--init", "pretrained"],
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fields(config, names):
    found = {}
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


@pytest.mark.parametrize("row", ROWS)
def test_a_flag_sets_its_field(row):
    argv, expected = ROWS[row]
    assert fields(parse(argv)[0], expected) == expected


@pytest.mark.parametrize("argv", OTHER_SPELLINGS, ids=" ".join)
def test_a_flag_by_its_other_name(argv):
    flag = argv[0].split("=")[0]
    flag = {"--model.name": "--arch", "--init": "--pretrained"}.get(flag, flag)
    row = next(row for row in ROWS if flag in row.split(", "))
    expected = {name: value for name, value in ROWS[row][1].items() if name != "model.name" or "resnet50" in argv[-1]}
    assert fields(parse(argv)[0], expected) == expected


def test_a_typical_command_line():
    """As in the README of the script, the folder last."""
    config, workdir, only_test = parse(["-a", "resnet50", "--lr", "0.01", "-b", "64", "-j", "4", "--wd", "1e-4", "imagenet"])
    expected = {"model.name": "resnet50", "optim.lr": 0.01, "data.batch_size": 64, "data.dir": "imagenet", "epochs": 100}
    assert fields(config, expected) == expected
    assert (workdir, only_test) == (Path("runs/scnet50"), False)


def test_a_folder_with_a_config():
    Path("mine.py").write_text("from train.config import Config\nconfig = Config(epochs=3)\n")
    config, workdir, _ = parse(["images", "--config", "mine.py"])
    assert fields(config, ["data.name", "data.dir", "epochs"]) == {"data.name": "folder", "data.dir": "images", "epochs": 3}
    assert workdir == Path("runs/mine")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--start-epoch", "50"], {"start_epoch": 50}),
        (["--optim.warmup-epochs", "20"], {"optim.warmup_epochs": 20}),
        (["--data.flip"], {"data.flip": True}),
        (["--data.no-flip"], {"data.flip": False}),
    ],
)
def test_with_a_folder_flags_need_not_fit_the_config_that_counts_without(flags, expected):
    assert fields(parse([*flags, "images"])[0], expected) == expected


def test_a_wrong_flag_with_a_folder_is_still_explained(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["images", "--opitm.lr", "3"])
    assert "Unrecognized options: --opitm.lr" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_a_folder_flags_must_fit_the_default():
    with pytest.raises(ConfigError, match="start_epoch must be at least 0 and under epochs, found 50"):
        parse(["--start-epoch", "50"])


def test_noise_takes_the_place_of_a_folder():
    expected = {"data.name": "synthetic", "data.dir": "", "data.image_size": 224, "model.name": "scnet50"}
    assert fields(parse(["--dummy", "images"])[0], expected) == expected


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {flag for row in [*ROWS, *ACTIONS, *HOSTS] for flag in row.split(", ")} <= words


def test_evaluate_with_weights_is_of_no_run():
    """The script's `-e --pretrained DIR`."""
    config, workdir, only_test = parse(["images", "-a", "scnet50", "--pretrained", "-e"])
    assert (config.model.init, config.data.dir, workdir, only_test) == ("pretrained", "images", None, True)


def test_evaluate_without_weights_is_of_a_run():
    with pytest.raises(ConfigError, match=r"^no run in runs/digits: it has no config.json"):
        parse(["--evaluate"])


def test_resume_takes_a_folder_not_a_file():
    Path("checkpoint.pth.tar").touch()
    with pytest.raises(
        ConfigError, match=r"^checkpoint.pth.tar is a file, and a run is a folder; .*: --init checkpoint.pth.tar$"
    ):
        parse(["--resume", "checkpoint.pth.tar"])


@pytest.mark.parametrize(
    ("argv", "setting", "value"),
    [(["--gpu", "3"], "jax_cuda_visible_devices", "3"), (["--no-accel"], "jax_platforms", "cpu")],
)
def test_devices_are_chosen_before_jax_looks_for_them(monkeypatch, argv, setting, value):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    join(argv)
    assert settings == {setting: value}


@pytest.mark.parametrize("argv", [["--multiprocessing-distributed"], ["--dist-backend", "nccl"]], ids=lambda argv: argv[0])
def test_what_has_no_use_here_says_so(capsys, argv):
    before = parse([])
    capsys.readouterr()
    assert parse(argv) == before
    assert capsys.readouterr().out.startswith(f"{argv[0]} is of no use here: ")


@pytest.mark.parametrize(
    "argv",
    [
        ["--world-size", "4", "--rank", "2", "--dist-url", "tcp://10.0.0.1:8476"],
        ["--hosts.count", "4", "--hosts.index", "2", "--hosts.address", "10.0.0.1:8476"],
    ],
)
def test_the_hosts_by_either_name(monkeypatch, argv):
    found = []
    monkeypatch.setattr(main, "Link", lambda hosts, flags: found.append((hosts, flags)))
    join([*argv, "--seed", "3"])
    (hosts, flags) = found[0]
    assert hosts == Hosts(count=4, index=2, address="10.0.0.1:8476")
    assert not any("index" in flag for flag in flags), "what differs between hosts is not compared"
    assert flags[-2:] == ["--seed", "3"]


def test_the_page_has_a_row_for_each():
    rows = re.findall(r"^\| `([^|]*)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(row.replace("`", "") for row in rows) == sorted([*ROWS, *ACTIONS, *HOSTS])
