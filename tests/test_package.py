"""What `import scconv_jax` loads and costs, measured in fresh interpreters, and which names it exports."""

import json
import statistics
import subprocess
import sys

import pytest

import scconv_jax


def python(code: str) -> str:
    """Runs `code` in a fresh interpreter and returns its output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    modules = json.loads(python("import scconv_jax, sys, json; print(json.dumps(sorted(sys.modules)))"))
    roots = {name.partition(".")[0] for name in modules}
    assert {"jax", "flax", "scconv_jax"} <= roots
    # Packages that only the tests or only the trainer need. flax itself imports optax and orbax.
    unwanted = {"torch", "tensorflow", "train", "matplotlib", "tyro", "grain", "sklearn", "jaxtyping", "beartype", "timm", "PIL"}
    assert not roots & unwanted


def test_import_adds_little_to_that_of_flax():
    """At most 0.3 s or, where Python is so slow that flax takes more than a second, 0.3 of flax's time.

    Takes the median CPU time of three runs: other processes disturb CPU time less than wall time.
    """
    code = """
import time
start = time.process_time()
import flax.linen, jax.numpy
middle = time.process_time()
import scconv_jax
print(middle - start, time.process_time() - middle)
"""
    flax, own = zip(*(map(float, python(code).split()) for _ in range(3)), strict=True)
    assert statistics.median(own) < 0.3 * max(1, statistics.median(flax))


def test_import_allocates_nothing():
    """No backend is initialised, so users can still choose the platform and the precision after the import."""
    code = "import scconv_jax; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert python(code).strip() == "False"


def test_the_error_for_scconv_names_both_operators():
    with pytest.raises(AttributeError) as error:
        scconv_jax.SCConv  # noqa: B018
    assert "SelfCalibratedConv" in str(error.value)
    assert "ScConv" in str(error.value).replace("SCConv", "")


def test_an_unknown_name_gives_the_usual_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'scconv_jax' has no attribute 'SelfCalibratedConvs'"):
        scconv_jax.SelfCalibratedConvs  # noqa: B018


def test_every_exported_name_exists():
    assert sorted(scconv_jax.__all__) == sorted(set(scconv_jax.__all__))
    for name in scconv_jax.__all__:
        assert getattr(scconv_jax, name) is not None
    assert "SCConv" not in scconv_jax.__all__
