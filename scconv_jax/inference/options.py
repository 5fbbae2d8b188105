"""`inference_options`: the compiler options with which inference is fastest.

On CPU, XLA has two implementations of convolutions: calls of the YNNPACK library, its default, and its own older one. The older
one is faster forward and slower backward (docs/performance.md), so it suits a program that computes no gradient.
"""

from __future__ import annotations

import functools
import os
import warnings

import jax

_NAME = "xla_cpu_experimental_ynn_fusion_type"
_VALUE = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"  # YNNPACK computes matmuls only, not convolutions


def inference_options(platform: str | None = None) -> dict[str, str]:
    """Return compiler options for programs that compute no gradient: `jax.jit(f, compiler_options=inference_options())`.

    They change speed, and values by rounding. They hold for one program only: others keep XLA's defaults.

    Args:
        platform: "cpu", "gpu" or "tpu", the platform that the program is compiled for. If None, JAX's default.

    Returns:
        Options that the installed XLA accepts. Empty for platforms other than CPU, for an XLA that does not have the option, and
        if the environment variable `XLA_FLAGS` sets it.
    """
    try:
        on_cpu = (platform or jax.default_backend()) == "cpu"
    except RuntimeError:  # no platform can be used; the program itself will say why
        return {}
    return {_NAME: _VALUE} if on_cpu and _NAME not in os.environ.get("XLA_FLAGS", "") and _accepted(_NAME, _VALUE) else {}


@functools.cache
def _accepted(name: str, value: str) -> bool:
    """Return whether the installed XLA compiles a program with this option, by compiling a small one (0.1 s, once)."""
    try:
        with warnings.catch_warnings(), jax.default_device(jax.local_devices(backend="cpu")[0]):
            warnings.simplefilter("ignore")
            jax.jit(lambda x: x, compiler_options={name: value}).lower(jax.ShapeDtypeStruct((), "float32")).compile()
    except Exception:  # an option of a compiler that is called experimental can fail in any way
        return False
    return True
