"""The flags, among them every flag of PyTorch's ImageNet script (pytorch/examples, imagenet/main.py): docs/from_pytorch.md."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train import main
from train.config import ConfigError, Hosts
from train.config.files import CONFIGS
from train.config.flags import FULL_NAMES, SHORT_NAMES, expand
from train.main import join, parse
from train.run.workdir import save_config

PAGE = Path(__file__).parents[3] / "docs" / "from_pytorch.md"

ROWS = {
    "DIR": (["images"], {"data.name": "folder", "data.dir": "images", "model.name": "scnet50", "data.image_size": 224}),
    "-a, --arch": (["--arch", "resnet50"], {"model.name": "resnet50"}),
    "-j, --workers": (["-j", "7"], {"data.threads": 7}),
    "--epochs": (["--epochs", "90"], {"epochs": 90}),
    "--start-epoch": (["--start-epoch", "3"], {"start_epoch": 3}),
    "-b, --batch-size": (["-b", "128"], {"data.batch_size": 128}),
    "--lr, --learning-rate": (["--lr", "0.3"], {"optim.lr": 0.3}),
    "--opt": (["--opt", "adamw"], {"optim.name": "adamw"}),
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


def plan(argv):
    """The experiment, the folder of the run and whether it is only tested."""
    flags = parse(argv)
    return *main.plan_run(flags), flags.evaluate


def fields(config, names):
    """Field → value, for the `names` of fields; paths, which are absolute, relative to the current folder."""
    found = {}
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = str(Path(value).relative_to(Path.cwd())) if name == "data.dir" and value else value
    return found


@pytest.mark.parametrize("row", ROWS)
def test_a_flag_sets_its_field(row):
    argv, expected = ROWS[row]
    assert fields(plan(argv)[0], expected) == expected


@pytest.mark.parametrize("argv", OTHER_SPELLINGS, ids=" ".join)
def test_a_flag_by_its_other_name(argv):
    flag = argv[0].split("=")[0]
    flag = {"--model.name": "--arch", "--init": "--pretrained"}.get(flag, flag)
    row = next(row for row in ROWS if flag in row.split(", "))
    expected = {name: value for name, value in ROWS[row][1].items() if name != "model.name" or "resnet50" in argv[-1]}
    assert fields(plan(argv)[0], expected) == expected


def test_a_typical_command_line():
    """As in the README of the script, the folder last."""
    config, workdir, only_test = plan(["-a", "resnet50", "--lr", "0.01", "-b", "64", "-j", "4", "--wd", "1e-4", "imagenet"])
    expected = {"model.name": "resnet50", "optim.lr": 0.01, "data.batch_size": 64, "data.dir": "imagenet", "epochs": 100}
    assert fields(config, expected) == expected
    assert (workdir, only_test) == (Path("runs/scnet50"), False)


def test_a_folder_with_a_config():
    Path("mine.py").write_text("from train.config import Config\nconfig = Config(epochs=3)\n")
    config, workdir, _ = plan(["images", "--config", "mine.py"])
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
    assert fields(plan([*flags, "images"])[0], expected) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["images", "--opitm.lr", "3"], "there is no flag --opitm.lr. Did you mean '--optim.lr'"),
        (["--learning-rat=3"], "there is no flag --learning-rat. Did you mean '--learning-rate'?"),
        (["--data.no-filp"], "there is no flag --data.no-filp. Did you mean '--data.flip'?"),
        (["--lr-reference-batch", "3"], "there is no flag --lr-reference-batch. Did you mean '--optim.lr-reference-batch'?"),
        (["--nonsense"], "there is no flag --nonsense. All flags: python -m train.main --help"),
        (["images", "more"], "unexpected argument 'more': only one DIR can be given"),
        (["--world-size", "2", "--rank", "1"], "Hosts.address is missing: count, index and address go together"),
        (["--seed", "-1"], "Config.seed must be at least 0 and under 2**31, found -1"),
    ],
)
def test_a_wrong_flag_is_explained(argv, message):
    with pytest.raises(ConfigError) as raised:
        parse(argv)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "fast"], ("Error parsing --optim.lr: ", "'fast'")),
        (["--data.name", "digit"], ("invalid choice 'digit'", "'digits'", "'synthetic'")),
        (["--config"], ("Missing value for argument '--config'",)),
    ],
)
def test_a_value_of_the_wrong_type_is_explained(capsys, argv, words):
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in words:
        assert word in text


def test_without_a_folder_flags_must_fit_the_default():
    with pytest.raises(ConfigError, match="start_epoch must be at least 0 and under epochs, found 50"):
        plan(["--start-epoch", "50"])


def test_noise_takes_the_place_of_a_folder():
    expected = {"data.name": "synthetic", "data.dir": "", "data.image_size": 224, "model.name": "scnet50"}
    assert fields(plan(["--dummy", "images"])[0], expected) == expected


def help_of(argv, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse([*argv, "--help"])
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_help_names_every_flag(capsys):
    words = set(help_of([], capsys).replace(",", " ").split())
    assert {flag for row in [*ROWS, *ACTIONS, *HOSTS] for flag in row.split(", ")} <= words
    assert set(FULL_NAMES) <= words


@pytest.mark.parametrize(
    ("argv", "name", "epochs"),
    [
        ([], "scnet20_small", 12),
        (["images"], "scnet50", 100),
        (["--dummy"], "scnet50", 100),
        (["--config", str(CONFIGS / "cifar.py"), "--epochs", "3"], "scconv_resnet50_small", 200),
    ],
)
def test_the_help_shows_the_defaults_of_the_chosen_config(capsys, argv, name, epochs):
    text = help_of(argv, capsys)
    assert f"(default: {name})" in text
    assert f"--epochs INT Passes over the training images. (default: {epochs})" in text


def test_help_and_mistakes_need_no_jax():
    check = (
        "import sys\nfrom train.main import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as ended: code = ended.code\n"
        "sys.exit(code if 'jax' not in sys.modules else 99)"
    )
    for argv, code in ((["--help"], 0), (["--seed", "-1"], 2), (["--lr", "fast"], 2)):
        command = [sys.executable, "-c", check, *argv]
        assert subprocess.run(command, cwd=PAGE.parents[1], capture_output=True, check=False).returncode == code


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-b=3"], ["--data.batch-size", "3"]),
        (["-b256", "-j8"], ["--data.batch-size", "256", "--data.threads", "8"]),
        (["-aresnet50"], ["--model.name", "resnet50"]),
        (["--batch_size", "3"], ["--data.batch-size", "3"]),
        (["--data.dir=a=b"], ["--data.dir=a=b"]),
        (["--resume"], ["--resume"]),
        (["--resume", "--epochs", "3"], ["--resume", "--epochs", "3"]),
        (["--resume", "runs/x", "-e"], ["--resume", "--workdir", "runs/x", "--evaluate"]),
        (["--resume=runs/x"], ["--resume", "--workdir", "runs/x"]),
    ],
)
def test_short_names_are_replaced(argv, words):
    assert expand(argv) == words


def test_fields_by_both_spellings_and_the_last_of_two_counts():
    assert plan(["--data.batch_size", "16"])[0] == plan(["--data.batch-size=16"])[0] == plan(["-b", "8", "-b", "16"])[0]


def test_a_flag_equal_to_its_default_still_overrides_the_config():
    """`train.config.flags` parses flags before it knows the config; 1 is its placeholder for image_size."""
    assert fields(plan(["images", "--epochs", "12", "--data.image-size", "1"])[0], ["epochs", "data.image_size"]) == {
        "epochs": 12,
        "data.image_size": 1,
    }


def test_resume_with_a_folder_of_images_means_the_run_on_them():
    with pytest.raises(ConfigError, match=r"^no run in runs/scnet50: it has no config.json"):
        plan(["images", "--resume"])


def test_evaluate_with_weights_is_of_no_run():
    """The script's `-e --pretrained DIR`."""
    config, workdir, only_test = plan(["images", "-a", "scnet50", "--pretrained", "-e"])
    assert (config.model.init, workdir, only_test) == ("pretrained", None, True)
    assert fields(config, ["data.dir"]) == {"data.dir": "images"}


def test_evaluate_without_weights_is_of_a_run():
    with pytest.raises(ConfigError, match=r"^no run in runs/digits: it has no config.json"):
        plan(["--evaluate"])


def test_resume_takes_a_folder_not_a_file():
    Path("checkpoint.pth.tar").touch()
    with pytest.raises(
        ConfigError, match=r"^checkpoint.pth.tar is a file, and a run is a folder; .*: --init checkpoint.pth.tar$"
    ):
        plan(["--resume", "checkpoint.pth.tar"])


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket/run", "hdfs://node:9000/run", "abfss://a@b/run"])
@pytest.mark.parametrize(
    "flags", [["--workdir"], ["--resume"], ["--evaluate", "--workdir"], ["--data.name", "tfds", "--data.dir"]]
)
def test_an_address_of_a_store_is_no_folder(flags, name):
    """TPU users expect gs:// to work. It made a folder called `gs:` and failed after an epoch."""
    flag = "data.dir" if "--data.dir" in flags else "--workdir"
    with pytest.raises(ConfigError, match=f"^{flag}: {name} is an address, not a folder of this machine: mount what it names"):
        plan([*flags, name])
    with pytest.raises(ConfigError, match=f"^data.dir: {name} is an address"):
        plan([name])
    assert not list(Path().iterdir())


def test_a_home_folder_that_nobody_knows():
    for argv, where in ((["~no-such-user/x"], "data.dir"), (["--workdir", "~no-such-user/x"], "--workdir")):
        with pytest.raises(
            ConfigError, match=f"^{where}: ~no-such-user/x: no home folder is known for ~no-such-user; give the path"
        ):
            plan(argv)


def test_a_folder_whose_name_is_not_utf_8(monkeypatch):
    """Orbax and TFDS cannot name it; images in files can be there."""
    bad = os.fsdecode(b"caf\xe9")
    os.mkdir(bad)
    tfds = ["--data.name", "tfds", "--data.dir"]
    for folder, argv in ((".", ["--workdir", f"{bad}/run"]), (".", ["--workdir", bad]), (".", [*tfds, bad]), (bad, [])):
        monkeypatch.chdir(folder)
        field = "data.dir" if tfds[0] in argv else "--workdir"
        message = rf"^{field}: the path '.*caf\\udce9.*' is not UTF-8; rename it, or choose another$"
        with pytest.raises(ConfigError, match=message):
            plan(argv)
        assert not list(Path().rglob("run"))
    monkeypatch.chdir("..")
    assert fields(plan([bad])[0], ["data.dir"]) == {"data.dir": bad}


def test_paths_are_absolute_and_names_stay_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("weights.pth").touch()
    for given, expected in (
        ("weights.pth", tmp_path / "weights.pth"),
        ("~/weights.pth", tmp_path / "weights.pth"),
        ("pretrained", "pretrained"),
        ("scnet50", "scnet50"),
        ("https://x.org/a.pth", "https://x.org/a.pth"),
        ("absent.pth", "absent.pth"),
    ):
        assert plan(["--init", given])[0].model.init == str(expected)
    assert plan(["~/images"])[0].data.dir == str(tmp_path / "images")


def test_a_run_whose_images_have_moved(tmp_path, monkeypatch, capsys):
    """The config names them in full; the run may go on from anywhere, and a new folder has a plain way to be named."""
    Path("images").mkdir()
    config, workdir, _ = plan(["images", "--workdir", "run"])
    workdir.mkdir()
    save_config(workdir, config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for flag in ("--resume", "--evaluate"):
        assert plan(["--workdir", "../run", flag])[0] == config
        assert capsys.readouterr().out == ""
    (tmp_path / "images").rename("moved")
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(ConfigError) as raised:
            plan(["--workdir", "../run", flag])
        assert str(raised.value) == (
            f"the images of ../run were in {tmp_path / 'images'}, where there is no folder now: name their new folder, as in "
            f"python -m train.main DIR --workdir ../run {flag}"
        )
        found = plan(["moved", "--workdir", "../run", flag])[0]
        assert fields(found, ["data.dir"]) == {"data.dir": "moved"}
        assert capsys.readouterr().out.startswith("changed since the run began: data.dir: ")


def test_a_run_of_an_earlier_version_names_its_images_as_typed(capsys):
    Path("images").mkdir()
    config, workdir, _ = plan(["images", "--workdir", "run"])
    workdir.mkdir()
    save_config(workdir, dataclasses.replace(config, data=dataclasses.replace(config.data, dir="images")))
    for argv in (["--resume", "run"], ["images", "--resume", "run"]):
        assert plan(argv)[0] == config
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "setting", "value"),
    [(["--gpu", "3"], "jax_cuda_visible_devices", "3"), (["--no-accel"], "jax_platforms", "cpu")],
)
def test_devices_are_chosen_before_jax_looks_for_them(monkeypatch, argv, setting, value):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    join(parse(argv))
    assert settings == {setting: value}


@pytest.mark.parametrize("argv", [["--multiprocessing-distributed"], ["--dist-backend", "nccl"]], ids=lambda argv: argv[0])
def test_a_flag_without_effect_says_so(capsys, argv):
    before = plan([])
    capsys.readouterr()
    assert plan(argv) == before
    assert capsys.readouterr().out.startswith(f"{argv[0]} has no effect: one process drives all devices of a host")


@pytest.mark.parametrize(
    "argv",
    [
        ["--world-size", "4", "--rank", "2", "--dist-url", "tcp://10.0.0.1:8476"],
        ["--hosts.count", "4", "--hosts.index", "2", "--hosts.address", "10.0.0.1:8476"],
    ],
)
def test_the_hosts_by_either_name(monkeypatch, argv):
    found = []
    monkeypatch.setattr(main, "HostLink", lambda hosts, flags: found.append((hosts, flags)))
    join(parse([*argv, "--gpu", "1", "--seed", "3"]))
    (hosts, flags) = found[0]
    assert hosts == Hosts(count=4, index=2, address="10.0.0.1:8476")
    assert flags == ["seed 3", "hosts.count 4", f"hosts.address {argv[-1]}"], "flags that may differ between hosts are left out"


def test_the_page_has_a_row_for_each_flag():
    flags, _ = PAGE.read_text().split("\n## Other differences")
    rows = re.findall(r"^\| `([^|]*)` \|", flags, re.MULTILINE)
    rows = [row.replace("`", "") for row in rows]
    assert sorted(rows) == sorted([*ROWS, *ACTIONS, *HOSTS])
    ours = {"--init", "--profile-steps"}
    named = {name for row in rows for name in row.split(", ")}
    assert set(FULL_NAMES) - ours <= named


def test_every_short_name_stands_for_a_flag(capsys):
    text = help_of([], capsys)
    for full in SHORT_NAMES.values():
        assert f"{full.split()[0]} " in text.partition("positional arguments")[2]
