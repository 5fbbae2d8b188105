"""What each step of fast inference on the CPU gains: the compiler options, folded norms, Winograd's form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import scconv_jax
from benchmarks.programs import batch, variables_of
from benchmarks.timing import alternate, milliseconds, ratio, record, table

NETWORKS = ("resnet50", "scnet50", "scconv_resnet50")
ROUNDS = {1: 41, 8: 15}
"""Rounds by number of images."""


def main() -> None:
    """Time each form of each network in turn, and record the ratios to the form before it."""
    rows = []
    for name in NETWORKS:
        model = scconv_jax.create_model(name)
        variables = variables_of(model)
        for images, rounds in ROUNDS.items():
            x = jnp.asarray(batch(images)[0])
            folded, fused = (scconv_jax.fuse(model, variables, x, platform=platform) for platform in ("gpu", "cpu"))
            forms = {
                "XLA's defaults": (model, variables, None),
                "`inference_options()`": (model, variables, scconv_jax.inference_options()),
                "`fuse`, norms and joined convolutions": (*folded, scconv_jax.inference_options()),
                "`fuse` with Winograd's form": (*fused, scconv_jax.inference_options()),
            }
            times = alternate({form: call(network, own, options, x) for form, (network, own, options) in forms.items()}, rounds)
            before = "XLA's defaults"
            for form, own in times.items():
                rows.append([name, str(images), form, milliseconds(own), ratio(own, times[before])])
                before = form
                print(*rows[-1], flush=True)
    text = table(["network", "images", "form", "ms", "÷ the form before (least to greatest)"], rows)
    record("inference", "Steps of fast inference, float32, 224 px", text)


def call(model: Any, variables: Any, options: Any, x: jax.Array) -> Callable[[], object]:
    """Return a call that computes the logits once and waits for them."""
    program = jax.jit(functools.partial(model.apply, train=False)).lower(variables, x).compile(compiler_options=options)
    return lambda: program(variables, x).block_until_ready()


if __name__ == "__main__":
    main()
