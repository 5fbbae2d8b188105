"""Writes the network of the drawing page: `python docs/drawing/model.py RUN docs/extra/draw/digits.onnx`.

RUN is the folder of a run of `python -m train.main` on the digits. The file takes a scan as the data set has them, 8×8 pixels
from 0 to 16, and has all that follows: enlarging, rounding to 256 levels, normalising, the network, and the softmax.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import linen as nn

import scconv_jax
from scconv_jax import functional as F
from train.data.datasets import resize_bilinear

SCAN = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def make_function(trained):
    """Return a function of one scan (8, 8): probabilities, the enlarged image, and the gate σ(X1 + X1') of each stage."""
    preparation = trained.preparation
    mean, std = (jnp.asarray(values, jnp.float32) for values in (preparation.mean, preparation.std))
    corners = np.eye(8)[:, :, None] * np.ones(8)  # images of one bright row: their columns are the weights of the rows
    rows = jnp.asarray(resize_bilinear(corners, preparation.size)[:, :, 0].T, jnp.float32)
    variables = jax.tree.map(jnp.asarray, trained.variables)

    def function(scan):
        image = jnp.round(255 * (rows @ (scan / 16) @ rows.T)) / 255
        pixels = jnp.broadcast_to(image[None, :, :, None], (1, *image.shape, preparation.channels))
        gates = {}

        def record(run, arguments, options, context):
            module = context.module
            if isinstance(module, scconv_jax.SelfCalibration) and context.method_name == "__call__":
                maps = F.resize_nearest(module.k2(F.avg_pool(arguments[0], module.pooling), train=False), arguments[0].shape[1:3])
                gates[module.path[0]] = jax.nn.sigmoid(arguments[0] + maps).mean(axis=3)[0]  # of a stage, the last block stays
            return run(*arguments, **options)

        with nn.intercept_methods(record):
            logits = trained.model.apply(variables, (pixels - mean) / std, train=False)
        return {"probabilities": jax.nn.softmax(logits)[0], "image": image, **gates}

    return function


def check(model, function, scans):
    """Compare ONNX Runtime with JAX."""
    session, network = onnxruntime.InferenceSession(model), jax.jit(function)
    names = [output.name for output in session.get_outputs()]
    for scan in scans:
        found = dict(zip(names, session.run(None, {"scan": scan}), strict=True))
        for name, value in network(scan).items():
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def main():
    """Write the file after a comparison with JAX on real scans and on noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run on the digits")
    parser.add_argument("out", help="the .onnx file")
    options = parser.parse_args()
    trained = scconv_jax.load_run(options.run)
    function = make_function(trained)
    model = scconv_jax.to_onnx(function, SCAN, inputs=["scan"], metadata={"model": trained.name}).SerializeToString()
    from sklearn.datasets import load_digits

    scans = load_digits().images[:20].astype(np.float32)
    check(model, function, [*scans, np.random.default_rng(0).uniform(0, 16, (8, 8)).astype(np.float32)])
    with scconv_jax.files.replacing(options.out) as path:
        path.write_bytes(model)
    print(f"{options.out}: {len(model):,} bytes, equal to JAX within 1e-5 on 21 scans")


if __name__ == "__main__":
    main()
