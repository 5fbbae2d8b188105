"""Compiled programs are kept in the cache folder, and no state of that folder stops a run."""

import logging
import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from scconv_jax import programs
from scconv_jax.programs import keep_programs
from train.config.flags import parse_flags

SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A cache folder of its own, and JAX's settings as a user has them; both are restored after the test."""
    monkeypatch.setenv("SCCONV_JAX_CACHE", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    with warnings.catch_warnings():
        yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_and_run() -> float:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.float32(2)))


def test_a_program_is_kept_and_read_again_also_if_its_file_is_damaged(folder):
    kept = keep_programs()
    assert kept is not None
    assert kept.parent == folder
    assert jax.config.jax_compilation_cache_dir == str(kept)
    first = compile_and_run()
    files = list(kept.glob("*-cache"))
    assert files
    assert compile_and_run() == first
    for file in files:
        file.write_bytes(b"damaged")
    assert compile_and_run() == first


@pytest.mark.parametrize(("setting", "value"), [("jax_compilation_cache_dir", "mine"), ("jax_enable_compilation_cache", False)])
def test_settings_of_the_user_take_precedence(folder, setting, value):
    jax.config.update(setting, value)
    assert keep_programs() is None
    assert getattr(jax.config, setting) == value
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_or_is_full_is_one_line(monkeypatch, folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "scconv_jax"):
        assert keep_programs() is None
    folder.unlink()
    monkeypatch.setattr(programs, "LEAST_FREE_BYTES", 2**62)
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"Compiled programs are not kept in {folder}/")
    assert first.endswith(
        "(Not a directory), so every start compiles anew. SCCONV_JAX_CACHE names another folder."
    ) or first.endswith("(File exists), so every start compiles anew. SCCONV_JAX_CACHE names another folder.")
    assert "MB are free), so every start compiles anew." in second


def test_the_oldest_programs_are_deleted_if_the_folder_is_too_large(monkeypatch):
    kept = keep_programs()
    for age, name in enumerate(("new", "old", "oldest")):
        path = kept / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (10**9 - age, 10**9 - age))
    monkeypatch.setattr(programs, "MOST_BYTES", 150)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert [path.name for path in kept.glob("*-cache")] == ["new-cache"]


def test_each_kind_of_processor_has_its_own_folder(monkeypatch):
    monkeypatch.setattr(programs.platform, "machine", lambda: "other")
    kept = keep_programs()
    assert kept is not None
    assert kept.name.startswith("other-")


def test_the_trainer_has_a_flag_that_keeps_no_programs():
    assert parse_flags(["--no-compile-cache"]).no_compile_cache
    assert not parse_flags([]).no_compile_cache
