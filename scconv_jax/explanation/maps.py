"""What a network looks at and how its operators weigh, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scconv_jax.explanation.capture import apply, examine, find_places
from scconv_jax.explanation.units import Separation
from scconv_jax.messages import listed
from scconv_jax.models import scnet
from scconv_jax.models.registry import MODELS

Variables = Mapping[str, Any]
_applied = partial(jax.jit, static_argnums=0)(lambda model, variables, images: apply(model, variables, images, {}))


def grad_cam(
    model: nn.Module,
    variables: Variables,
    images: jax.Array | np.ndarray,
    classes: int | Sequence[int] | np.ndarray | jax.Array | None = None,
    layer: str | None = None,
) -> jax.Array:
    """Return Grad-CAM: the areas of a layer's map that speak for a class.

    Paper: Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", ICCV 2017, Eqs. 1-2: ReLU(Σ_c α_c A_c), where A is the layer's map and α_c the average, over all pixels, of the
    derivative of the class's logit by A_c.

    Args:
        model: A network of this library, or another Flax module called as `model(images, train=...)` that returns logits.
        variables: Its variables.
        images: Prepared images, float `(n, h, w, c)`.
        classes: The class, for all images or `(n,)` for each. If None, each image's most probable class.
        layer: Name of a stage, such as `layer3`, or path of a module with a map, such as `layer3/0/conv3`. If None, the last
            stage.

    Returns:
        `(n, h, w)` of the size of the layer's map, at least 0; its scale differs from image to image.

    Raises:
        ValueError: There is no such layer or class, `classes` has another shape, or the network does not take the images.
    """
    images = jnp.asarray(images)
    layers = None if layer is None else [layer]
    places = list(find_places(model, variables, images, layers).items())[-1:]
    none = jnp.zeros((len(images), 0), jnp.int32)
    if classes is None:
        return examine(model, variables, images, none, tuple(places), top=1).cams[places[0][0]][:, 0]
    chosen, count = np.asarray(classes), jax.eval_shape(partial(model.apply, train=False), variables, images).shape[-1]
    if chosen.dtype.kind not in "iu" or chosen.shape not in ((), (len(images),)):
        raise ValueError(
            f"classes has shape {chosen.shape} and dtype {chosen.dtype}; expected one integer, or one for each of the "
            f"{len(images)} images."
        )
    if outside := chosen[(chosen < 0) | (chosen >= count)].tolist():
        raise ValueError(f"There is no class {outside[0]}: the network has classes 0 to {count - 1}.")
    rows = jnp.asarray(np.broadcast_to(chosen, (len(images),))[:, None], jnp.int32)
    return examine(model, variables, images, rows, tuple(places)).cams[places[0][0]][:, 0]


def receptive_fields(
    model: nn.Module, variables: Variables, images: jax.Array | np.ndarray, layers: Sequence[str] | None = None
) -> dict[str, jax.Array]:
    """Return the effective receptive field of the central pixel of each layer's map.

    Paper: Luo, Li, Urtasun, Zemel, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS
    2016. The field is the derivative, by each pixel of the image, of the map's central pixel (row h // 2, column w // 2), summed
    over its channels; absolute values are averaged over the images and their channels.

    Args:
        model: As for `grad_cam`.
        variables: Its variables.
        images: Prepared images, float `(n, h, w, c)`. The field depends on them: gates and ReLUs let different pixels through.
        layers: As `layer` of `grad_cam`, several. If None, all stages.

    Returns:
        Layer to `(h, w)`, the size of the images.

    Raises:
        ValueError: There is no such layer, or the network does not take the images.
    """
    images = jnp.asarray(images)
    places = tuple(find_places(model, variables, images, layers).items())
    found = examine(model, variables, images, jnp.zeros((len(images), 0), jnp.int32), places, fields=True)
    return {layer: field.mean(0) for layer, field in found.fields.items()}


def calibration_gates(model: nn.Module, variables: Variables, images: jax.Array | np.ndarray) -> dict[str, jax.Array]:
    """Return the gate σ(X1 + X1') of each self-calibrated convolution (Liu et al., CVPR 2020, Eqs. 3-5).

    Args:
        model: As for `grad_cam`.
        variables: Its variables.
        images: Prepared images, float `(n, h, w, c)`.

    Returns:
        Path of each `SelfCalibration` in the variables, such as `layer1/0/scconv`, to its gate `(n, h, w, c)`, between 0 and 1.

    Raises:
        ValueError: The network has no self-calibrated convolution, or does not take the images.
    """
    return _operators("gates", model, variables, images)


def reconstruction_maps(model: nn.Module, variables: Variables, images: jax.Array | np.ndarray) -> dict[str, Separation]:
    """Return the informative map W1 · X and the redundant map W2 · X of each SRU (Li et al., CVPR 2023, Eqs. 1-3).

    Args:
        model: As for `grad_cam`.
        variables: Its variables.
        images: Prepared images, float `(n, h, w, c)`.

    Returns:
        Path of each `SRU` in the variables, such as `layer1/0/conv2/SRU`, to `(informative, redundant)`, each `(n, h, w, c)`, by
        the rules of the unit's variant. The variant "2023-09" multiplies GN(X) instead of X.

    Raises:
        ValueError: The network has no SRU, or does not take the images.
    """
    return _operators("separations", model, variables, images)


def fusion_weights(model: nn.Module, variables: Variables, images: jax.Array | np.ndarray) -> dict[str, jax.Array]:
    """Return the weights β1 and β2 of each CRU (Li et al., CVPR 2023, Eq. 8).

    Args:
        model: As for `grad_cam`.
        variables: Its variables.
        images: Prepared images, float `(n, h, w, c)`.

    Returns:
        Path of each `CRU` in the variables, such as `layer1/0/conv2/CRU`, to `(n, 2, c)`: β1, then β2. In the paper's form their
        sum is 1 for each channel; in the public code's versions the sum of all 2 c is 1.

    Raises:
        ValueError: The network has no CRU, or does not take the images.
    """
    return _operators("fusions", model, variables, images)


_OPERATORS = {
    "gates": ("self-calibrated convolution", tuple(spec.name for spec in scnet.SPECS)),
    "separations": ("SRU", tuple(name for name, spec in MODELS.items() if "variant" in spec.options)),
    "fusions": ("CRU", tuple(name for name, spec in MODELS.items() if "variant" in spec.options)),
}
"""What each field of `Captured` needs, and the networks that have it."""


def networks_with(kind: str) -> list[str]:
    """Return the names of the networks that have the operator of a kind, sorted."""
    return sorted(_OPERATORS[kind][1])


def require_operator(kind: str, found: object, name: str) -> None:
    """Raise a ValueError that lists the networks with an operator, if nothing of its kind was found."""
    if not found:
        raise ValueError(f"{name} has no {_OPERATORS[kind][0]}. These networks have one: {listed(networks_with(kind), 20)}.")


def _operators(kind: str, model: nn.Module, variables: Variables, images: jax.Array | np.ndarray) -> Any:
    """Return what the network's operators of a kind compute."""
    found = getattr(_applied(model, variables, jnp.asarray(images)), kind)
    require_operator(kind, found, type(model).__name__)
    return found
