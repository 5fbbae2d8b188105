"""What happens inside a network: the maps after its stages, and the inputs of the papers' operators.

Flax's `intercept_methods` reads the values while the network is traced. The networks themselves have no code for it, so their
programs for training and inference stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.explanation.units import Separation, channel_weights, separate
from scconv_jax.layers.reconstruction import CRU, SRU
from scconv_jax.layers.self_calibrated import SelfCalibratedConv, SelfCalibration
from scconv_jax.messages import did_you_mean, listed

POOL = "pool"
"""Place of the last map: the argument of the network's method `pool`. All other places are paths of modules."""


class Captured(NamedTuple):
    """The values that one application of a network gives. Keys are names of layers, or paths of modules in the variables."""

    logits: jax.Array
    maps: dict[str, jax.Array]
    gates: dict[str, jax.Array]  # of each SelfCalibration: σ(X1 + X1')
    separations: dict[str, Separation]  # of each SRU
    fusions: dict[str, jax.Array]  # of each CRU: β1 and β2, (n, 2, c)


def apply(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    places: Mapping[str, str],
    changes: Mapping[str, jax.Array] | None = None,
) -> Captured:
    """Apply a network and return its logits, the maps of some layers, and all that its operators weigh.

    Args:
        model: The network.
        variables: Its variables.
        images: Prepared images.
        places: Place of each layer's map.
        changes: What is added to the map of each layer: zeros, to differentiate by the map.
    """
    x1: dict[str, jax.Array] = {}
    contexts: dict[str, jax.Array] = {}
    found = Captured(jnp.zeros(()), {}, {}, {}, {})

    def keep(place: str, value: Any) -> Any:
        for layer, other in places.items():
            if other == place:
                found.maps[layer] = value
                value = value if changes is None else value + changes[layer]
        return value

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name == POOL and not path:
            return next_call(keep(POOL, args[0]), *args[1:], **kwargs)
        if context.method_name != "__call__" or not path:
            return next_call(*args, **kwargs)
        if isinstance(module, SelfCalibration):
            x1[path] = args[0]
        elif isinstance(module, SelfCalibratedConv):
            x1[f"{path}/scconv"] = F.halves(args[0])[0]
        elif isinstance(module, SRU):
            found.separations[path] = separate(module, args[0])
        elif isinstance(module, CRU):
            found.fusions[path] = channel_weights(module, args[0])
        result = next_call(*args, **kwargs)
        if module.name == "k2":
            contexts[path.removesuffix("/k2")] = result
        return keep(path, result)

    with nn.intercept_methods(intercept):
        logits = model.apply(variables, images, train=False)
    for path, x in x1.items():
        found.gates[path] = jax.nn.sigmoid(x + F.resize_nearest(contexts[path], (x.shape[1], x.shape[2])))
    return found._replace(logits=jnp.asarray(logits))


def find_places(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, layers: Sequence[str] | None
) -> dict[str, str]:
    """Return the place of each layer's map.

    Args:
        model: The network.
        variables: Its variables.
        images: Prepared images; only their shape matters.
        layers: Names of stages, as `features` returns them, or paths of modules, such as `layer3/0/conv3`. If None, all stages.

    Raises:
        ValueError: The network has no such layer, or it has no stages and `layers` is None.
    """
    places: dict[str, str] = {}
    modules: dict[str, tuple[int, ...]] = {}

    def trace(variables: Mapping[str, Any], images: jax.Array) -> None:
        results: list[tuple[str, Any]] = []

        def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path, stages = "/".join(context.module.path), None
            if context.method_name == POOL and not path:
                results.append((POOL, args[0]))
            result = next_call(*args, **kwargs)
            if context.method_name == "features" and not path and isinstance(result, dict):
                stages = result
            elif context.method_name == "__call__" and path and hasattr(result, "ndim"):
                results.append((path, result))
                modules[path] = result.shape
            for layer, value in (stages or {}).items():
                # A stage returns the map of its last block: the stage is the last module with this map.
                same = [place for place, other in results if other is value]
                places[layer] = same[-1] if same else POOL
            return result

        with nn.intercept_methods(intercept):
            model.apply(variables, images, train=False)

    jax.eval_shape(trace, variables, images)
    if layers is None and not places:
        raise ValueError(f"{type(model).__name__} has no stages: name layers, such as {listed(_with_maps(modules), 3)}.")
    for layer in layers or ():
        if layer not in places and len(modules.get(layer, ())) != 4:
            known = list(dict.fromkeys([*places, *_with_maps(modules)]))
            raise ValueError(
                f"{type(model).__name__} has no layer {layer!r} with a map.{did_you_mean(layer, known)} "
                f"Its layers: {listed(known)}."
            )
    return places if layers is None else {layer: places.get(layer, layer) for layer in layers}


def _with_maps(modules: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the paths of the modules whose result is a map, outer ones first."""
    return sorted((path for path, shape in modules.items() if len(shape) == 4), key=lambda path: path.count("/"))


class Examined(NamedTuple):
    """What `examine` returns."""

    captured: Captured
    classes: jax.Array  # (n, k)
    cams: dict[str, jax.Array]  # layer to Grad-CAM, (n, k, h, w)
    fields: dict[str, jax.Array]  # layer to the receptive field in each image, (n, height, width) of the images


@partial(jax.jit, static_argnums=(0, 4), static_argnames=("top", "fields"))
def examine(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    classes: jax.Array,
    places: tuple[tuple[str, str], ...],
    *,
    top: int = 0,
    fields: bool = False,
) -> Examined:
    """Return what `apply` returns, Grad-CAM, and effective receptive fields, by one program.

    Args:
        model: The network.
        variables: Its variables.
        images: Prepared images.
        classes: Classes of each image for Grad-CAM, `(n, any number)`.
        places: Layers and the places of their maps.
        top: Number of the most probable classes that come before these.
        fields: Whether to compute receptive fields.
    """
    shapes = jax.eval_shape(lambda: apply(model, variables, images, dict(places)).maps)
    zeros = {layer: jnp.zeros(shape.shape, shape.dtype) for layer, shape in shapes.items()}

    def outputs(images: jax.Array, changes: dict[str, jax.Array]) -> Any:
        found = apply(model, variables, images, dict(places), changes)
        return (found.logits, found.maps), found

    _, pull_back, found = jax.vjp(outputs, images, zeros, has_aux=True)
    logits, layers = found.logits, list(zeros)
    classes = jnp.concatenate([jax.lax.top_k(logits, top)[1], classes], axis=1)
    count = classes.shape[1]

    # One backward pass, mapped over what is differentiated: the score of each class, then the central pixel of each layer.
    def gradients(which: jax.Array) -> Any:
        chosen = jnp.broadcast_to(which[None, :count, None], (*classes.shape, 1))
        scores = (jax.nn.one_hot(classes, logits.shape[1], dtype=logits.dtype) * chosen).sum(1)
        centres = dict(zeros)
        for i, layer in enumerate(layers if fields else ()):
            _, height, width, _ = zeros[layer].shape
            centres[layer] = zeros[layer].at[:, height // 2, width // 2].set(which[count + i].astype(zeros[layer].dtype))
        return pull_back((scores, centres))

    by_image, by_map = jax.vmap(gradients)(jnp.eye(count + len(layers) * fields, dtype=logits.dtype))
    cams = {}
    for layer in layers:
        weights = by_map[layer][:count].mean((2, 3))  # (k, n, c)
        cams[layer] = jax.nn.relu(jnp.einsum("knc,nhwc->nkhw", weights, found.maps[layer]))
    centres = {layer: jnp.abs(by_image[count + i]).mean(3) for i, layer in enumerate(layers)} if fields else {}
    return Examined(found, classes, cams, centres)
