from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import scconv_jax
from train.run.profiler import Profiler, peak_multiply_adds, training_multiply_adds


def test_training_costs_three_forward_passes():
    model = scconv_jax.create_model("resnet20_small")
    assert training_multiply_adds(model, (32, 24, 3)) == 3 * scconv_jax.multiply_adds(model, (32, 24)) > 0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 494.5e12),
        ("NVIDIA H100 PCIe", 378e12),
        ("NVIDIA H200", 494.5e12),
        ("NVIDIA A100-SXM4-80GB", 156e12),
        ("TPU v4", 137.5e12),
        ("TPU v5 lite", 98.5e12),
        ("TPU v5p", 229.5e12),
        ("TPU v6 lite", 459e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_the_names_of_devices(kind, peak):
    assert peak_multiply_adds([SimpleNamespace(device_kind=kind)]) == peak
    assert peak_multiply_adds([SimpleNamespace(device_kind=kind)] * 4) == (peak and 4 * peak)


def test_a_profile_of_the_steps_asked_for(tmp_path):
    done = []
    with Profiler((2, 3), tmp_path / "profile") as profiler:
        for step in range(1, 5):
            profiler.before(step)
            assert (tmp_path / "profile").exists() == (step > 3)
            done.append(profiler.after(step, jnp.ones(3) + step))
    assert done == [False, False, True, False]
    names = {path.name.split(".", 1)[1] for path in (tmp_path / "profile").rglob("*") if path.is_file() and "." in path.name}
    assert "xplane.pb" in names


def test_a_profile_ends_with_the_run(tmp_path):
    with Profiler((1, 9), tmp_path / "profile") as profiler:
        profiler.before(1)
        jax.block_until_ready(jnp.ones(3) + 1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_profile_unless_asked_for(tmp_path):
    with Profiler((), tmp_path / "profile") as profiler:
        profiler.before(1)
        assert not profiler.after(1, None)
    assert not (tmp_path / "profile").exists()
