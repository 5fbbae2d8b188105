"""Uses an installed wheel as its users do: import, command line, conversion of a PyTorch file, prediction.

Run by `.ci/check-wheel` outside the checkout, in an environment that holds the library and its requirements alone.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling takes most of the time

import jax
import numpy as np

import scconv_jax

start = time.perf_counter()
installed = Path(scconv_jax.__file__)
assert "site-packages" in installed.parts, f"{installed} is not the installed package"
for package in ("train", "tests", "torch", "PIL"):
    assert importlib.util.find_spec(package) is None, f"the environment must not hold {package}"
assert (installed.parent / "py.typed").exists()

# A checkpoint as PyTorch writes it, and the network that it belongs to.
model = scconv_jax.create_model("scnet20_small")
generator = np.random.default_rng(0)
images = generator.normal(size=(2, 32, 32, 3)).astype(np.float32)
shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
variables = jax.tree.map(lambda leaf: generator.uniform(0.01, 0.1, leaf.shape).astype(leaf.dtype), shapes)
scconv_jax.save("theirs.pth", variables)
predict = jax.jit(lambda variables: model.apply(variables, images, train=False))
expected = np.asarray(predict(variables))
assert expected.shape == (2, 10)
assert np.isfinite(expected).all()

command = Path(sys.executable).with_name("scconv-jax")
for arguments in (["--version"], ["env"], ["summary", "scnet50"], ["convert", "theirs.pth", "--out", "ours.safetensors"]):
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    assert done.stdout, arguments
for path in ("theirs.pth", "ours.safetensors"):
    loaded, found = scconv_jax.load_model(path)
    assert loaded == model, loaded
    np.testing.assert_array_equal(predict(found), expected)

versions = f"scconv_jax {scconv_jax.__version__}, Python {sys.version.split()[0]}, jax {jax.__version__}"
print(f"{versions}: the wheel alone imports, converts and predicts ({time.perf_counter() - start:.0f} s)")
