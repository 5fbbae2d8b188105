"""`python -m scconv_jax env`: complete, private, and robust against broken accelerator plug-ins."""

import getpass
import json
import os
import platform

import jax
import numpy as np
import pytest

from scconv_jax import __version__, environment
from scconv_jax.cli import main


@pytest.fixture(scope="module")
def found():
    return environment.environment()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Returns a function that installs a plug-in of JAX with the given first line."""

    def install(line):
        package = tmp_path / "jax_plugins" / "broken"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"import os, time\n\ndef initialize():\n    {line}\n")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        # Plug-ins are loaded only if no platform is named.
        monkeypatch.setenv("JAX_PLATFORMS", "")

    return install


def test_the_report_is_complete(found):
    assert found["scconv_jax"] == __version__
    assert found["python"].startswith(platform.python_version())
    assert found["packages"]["jax"] == jax.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint"} <= found["packages"].keys()
    assert found["jax"] == {
        "backend": "cpu",
        "x64": False,
        "devices": [{"platform": "cpu", "kind": "cpu", "count": jax.local_device_count(), "memory_gib": None}],
    }
    assert found["variables"]["XLA_FLAGS"] == environment.private(os.environ["XLA_FLAGS"])
    assert 1 <= found["processor"]["usable_cores"] <= found["processor"]["cores"]
    assert found["memory_gib"] > 0


def test_the_command_prints_lines_or_json(found, capsys, monkeypatch):
    monkeypatch.setattr("scconv_jax.cli.env.environment", lambda: found)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["env"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["jax"].strip() == jax.__version__
    assert lines["devices"].strip() == f"{jax.local_device_count()} × cpu (cpu)"
    assert lines["backend"].strip() == "cpu, 64 bits off"


def test_the_report_is_private(monkeypatch):
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": "/data/mary/cache",
        "XLA_FLAGS": f"--xla_dump_to={os.path.expanduser('~')}/dump --xla_cpu_use_fusion_emitters=true",
        "JAX_COORDINATOR_ADDRESS": "trainer-7.example.org:1234",
        "JAX_TOKEN": "abc123",
        "WANDB_API_KEY": "def456",
    }.items():
        monkeypatch.setenv(name, value)
    variables = environment._variables()
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "(path)"
    assert variables["XLA_FLAGS"] == "--xla_dump_to=(path) --xla_cpu_use_fusion_emitters=true"
    assert variables["JAX_COORDINATOR_ADDRESS"] == variables["JAX_TOKEN"] == "(not shown)"
    assert "WANDB_API_KEY" not in variables


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open /home/mary/lib.so: no such file", "cannot open (path): no such file"),
        ("cannot open '~/x y'", "cannot open '(path) y'"),
        (r"cannot open C:\Users\mary\lib.dll", "cannot open (path)"),
        ("read gs://bucket/mary", "read (address)"),
        ("--hub_token=abc on", "--hub_token=(not shown) on"),
        ("12 GiB / 16 GiB, float32/bfloat16", "12 GiB / 16 GiB, float32/bfloat16"),
    ],
)
def test_paths_addresses_and_secrets_are_hidden(text, shown, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "mary")
    assert environment.private(text) == shown
    assert environment.private("owned by mary, summary") == "owned by (user), summary"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("raise RuntimeError('no driver in /home/mary/lib')", "RuntimeError: no driver in (path)"),
        ("os.write(2, b'bad card'); os.abort()", "JAX cannot start its devices (signal SIGABRT): bad card"),
        ("time.sleep(600)", "JAX did not start its devices within 3 s"),
    ],
)
def test_a_broken_plugin_is_one_line(plugin, line, problem):
    plugin(line)
    assert environment._devices(3 if "sleep" in line else 60)["problem"] == problem
