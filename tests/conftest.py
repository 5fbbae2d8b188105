"""Sets up JAX for the tests, before anything imports it, and defines the shared fixtures.

JAX runs at its strictest: eight simulated CPU devices and no implicit rank promotion. pyproject.toml adds the rest: warnings
are errors, and each call is checked against its shape annotations. Only the files `test_*_equivalence.py` need PyTorch.
"""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import zlib

DEVICES = 8

# The environment also reaches the workers of pytest-xdist and every process that a test starts.
_flags = os.environ.get("XLA_FLAGS", "")
for _flag in (
    f"--xla_force_host_platform_device_count={DEVICES}",
    # LLVM's optimisations take half of the suite's time and change no result beyond rounding. The equivalence tests in
    # float32 switch them on again (`tests.equivalence.jit`).
    "--xla_backend_optimization_level=0",
    # XLA's newer emitters of loops take a third of the time of tests that compile much. jaxlib 0.12 does not know the flag.
    *["--xla_cpu_use_fusion_emitters=false"] * (importlib.metadata.version("jaxlib").startswith("0.10.")),
):
    if _flag.split("=")[0] not in _flags:
        _flags = f"{_flags} {_flag}".strip()
os.environ["XLA_FLAGS"] = _flags
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # A program that several tests or processes need is compiled once. The cache starts empty and goes at the end.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="scconv-jax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # for processes that tests start

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.browser import open_page  # noqa: E402, F401 a fixture for every test

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # to store a small program takes longer than it saves

# To trace a network makes a million objects. At Python's own thresholds, the collector takes about a tenth of the time.
gc.freeze()
gc.set_threshold(200_000, 10, 10)

if importlib.util.find_spec("torch") is not None:
    import torch

    torch.set_num_threads(1)  # each worker of pytest-xdist has a core; waiting threads would take the other's


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--once", action="store_true", help="run each test with the first of its parameters only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts slow tests first in the share that each worker of pytest-xdist begins with, so that all workers end together."""
    if config.getoption("--once"):
        first = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in first])
        items[:] = [item for item in items if item in first]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    if workers > 1:
        items[:] = [
            item
            for worker in range(workers)
            for tests in (slow, quick)
            for item in tests[len(tests) * worker // workers : len(tests) * (worker + 1) // workers]
        ]


@pytest.fixture
def x64():
    """Switches JAX to 64 bits for one test. JAX's caches distinguish the two modes, so nothing leaks into the next test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """Runs a test twice: in float64, where no tolerance can hide a mistake, and in float32, as users do."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def unchecked():
    """Switches the shape checks off, so that the library itself must find a wrong input, as it must for users."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def short_ghostnet(monkeypatch):
    """Gives GhostNet one block for each size of its maps, with and without squeeze-and-excitation."""
    from scconv_jax.models import ghostnet

    first, *groups = ghostnet.GHOSTNET
    monkeypatch.setattr(ghostnet, "GHOSTNET", (first, *[group for group in groups if group[0].strides == 2]))


@pytest.fixture
def seed(request) -> int:
    """A seed that depends on the test's name only."""
    return zlib.crc32(request.node.nodeid.encode())


# Largest difference from PyTorch allowed, relative to the largest value. float64: thousands of roundings of 1e-16 each
# stay below the limit; a systematic error is far above it. float32: outputs sum up to 9·512 products, in an order that
# differs between the two libraries, through up to 100 layers. Each rounding is about 6e-8, and they add up like a random walk.
LIMITS = {"float64": 1e-12, "float32": 2e-5}


@pytest.fixture
def close(request):
    """Returns `close(ours, theirs, what)`, which asserts equality up to rounding and records the difference for the report."""

    def check(ours, theirs, what: str = "output", *, limit: float | None = None) -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, expected {theirs.dtype}"
        assert ours.shape == theirs.shape, f"{what}: {ours.shape}, expected {theirs.shape}"
        assert theirs.size, f"{what}: empty"
        assert np.isfinite(theirs).all(), f"{what}: the reference is not finite"
        scale = np.abs(theirs).max()
        assert scale > 0, f"{what}: the reference is zero everywhere, which proves nothing"
        difference = float(np.abs(ours - theirs).max() / scale)
        limit = LIMITS[ours.dtype.name] if limit is None else limit
        area = request.path.stem.removeprefix("test_").removesuffix("_equivalence")
        request.node.user_properties.append(("difference", (area, ours.dtype.name, difference)))
        assert difference <= limit, f"{what}: differs by {difference:.2e} of the largest value; the limit is {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter) -> None:
    """Reports the largest difference from PyTorch for each file of equivalence tests."""
    found: dict[tuple[str, str], list[float]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "difference":
                area, dtype, difference = value
                found.setdefault((area, dtype), []).append(difference)
    if not found:
        return
    terminalreporter.section("largest difference from PyTorch, relative to the largest value")
    for (area, dtype), differences in sorted(found.items()):
        terminalreporter.write_line(f"{area:24} {dtype:8} {max(differences):.1e}   in {len(differences)} comparisons")
