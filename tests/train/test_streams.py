"""Standard streams that are closed or speak ASCII, for the trainer and the library's commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_main import SMALL
from tests.train.tiny import final_arrays

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CODE = """
import os, sys
from {module} import mend_streams
mend_streams()
with open("data", "w") as file:
    for number in (1, 2):
        os.write(number, b"noise of a library")
    print("8 × cpu …")
    print("…", file=sys.stderr, flush=True)
    assert sys.stdin.read() == ""
    file.write("kept")
assert not sys.stderr.isatty()
"""


def shell(command, folder, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("redirections", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-", ""])
@pytest.mark.parametrize("module", ["train.streams", "scconv_jax.cli.console"])
def test_closed_streams_write_nowhere(module, redirections, tmp_path):
    """Above all not into the next file that is opened, which would take their numbers."""
    (tmp_path / "code.py").write_text(CODE.format(module=module))
    done = shell(f"{sys.executable} code.py {redirections}", tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data").read_text() == "kept"
    assert done.stdout == (b"" if ">&-" in redirections.replace("2>&-", "") else b"noise of a library8 ? cpu ?\n")


def test_a_run_without_stderr_and_with_ascii(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    command = f"{sys.executable} -m tests.train.tiny --config small.py --epochs 1 --workdir run 2>&-"
    done = shell(command, tmp_path, **ASCII)
    assert done.returncode == 0, done.stdout
    assert b"8 ? cpu" in done.stdout
    assert final_arrays(tmp_path / "run")["step"] == 5


@pytest.mark.parametrize("redirection", ["2>&-", ">&-"])
def test_a_command_of_the_library(redirection, tmp_path):
    done = shell(f"{sys.executable} -m scconv_jax summary resnet20_small {redirection}", tmp_path, **ASCII)
    assert done.returncode == 0
    assert (b"resnet20_small" in done.stdout) == (redirection == "2>&-")
    assert done.stderr == b""
