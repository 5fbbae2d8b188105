"""`fuse`: a network and its variables in the form for inference."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from scconv_jax.fusion.forms import LEAVES, Affine, Folded, Form, Joined, Passed, Path
from scconv_jax.fusion.plan import FuseError, make_plan
from scconv_jax.messages import did_you_mean, listed

Variables = dict[str, Any]


def fuse(
    model: nn.Module, variables: Mapping[str, Any], images: Any = None, *, platform: str | None = None
) -> tuple[nn.Module, Variables]:
    """Return a network in its inference form, with fewer and larger operations, and its variables. The outputs are equal.

    BatchNorm is folded into the convolution or linear layer before it; elsewhere it becomes one multiply-add. The group-wise and
    point-wise convolutions of a CRU become one. On CPU, the kernels of 3×3 convolutions are transformed to Winograd's form where
    that is faster (docs/performance.md). Other layers stay.

    The result is an ordinary Flax module with the methods and attributes of `model`: `apply(variables, images, train=False)`,
    `method="features"`. Its variables have only `params`; `save`, `load`, `load_model` and `jax.export` accept them. It cannot
    train.

    Args:
        model: A network of this library, or a Flax module of your own that uses its layers, called as `model(x, train=False)` or
            `model(x)`.
        variables: Its variables, after training.
        images: An input of the model, or its shape and dtype. If None, one that the model accepts is found by tracing it. The
            sizes decide only which convolutions take Winograd's form.
        platform: "cpu", "gpu" or "tpu", where the network will run. If None, JAX's default. A network fused for one platform is
            correct on all.

    Returns:
        `(model, variables)`. Outputs differ from the original's by rounding: about 1e-6 of their scale in float32.

    Raises:
        FuseError: The variables do not fit the model or are fused already, a norm is not `scconv_jax.layers.BatchNorm`, the
            network is in training, or no input was found. It is a ValueError.
    """
    model = _check_model(model)
    tree = _check_variables(variables)
    example, options = _example(model, tree, images)
    plan = make_plan(model, tree, example, options, platform or jax.default_backend())
    return _fused_module(model, plan), _fused_variables(plan, tree)


def fused_like(model: Any, leaves: Mapping[Path, Any]) -> tuple[nn.Module, Variables]:
    """Return a network in the inference form whose leaves a file has, and the shapes of its variables.

    Args:
        model: The original network, one of the library's.
        leaves: The file's leaves by path, such as `("params", "conv1", "kernel")`.
    """
    example = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, model.in_channels), jnp.float32)
    options = {"train": False}
    template = jax.eval_shape(functools.partial(model.init, **options), jax.eval_shape(jax.random.key, 0), example)
    plan = make_plan(model, template, example, options, "other")
    for path, form in plan.items():
        if isinstance(form, Folded | Joined):
            plan[path] = form._replace(winograd=("params", *path, "winograd") in leaves)
    kernels = {path[1:-1] for path in leaves if path[-1] == "winograd"} - plan.keys()
    plan |= {path: Folded(None, True, "float32", "float32") for path in kernels}
    fused = _fused_module(model, plan)
    return fused, jax.eval_shape(functools.partial(fused.init, **options), jax.eval_shape(jax.random.key, 0), example)


def is_fused(variables: Mapping[str, Any]) -> bool:
    """Return whether variables come from `fuse`."""
    return any(path[-1] in LEAVES for path in traverse_util.flatten_dict(dict(variables)))


def without_fused(variables: Variables) -> Variables:
    """Return variables without the leaves that only `fuse` makes. Others are returned as they are."""
    if not is_fused(variables):
        return variables
    flat = traverse_util.flatten_dict(variables)
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] not in LEAVES})


def _check_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise FuseError(f"fuse takes a flax.linen.Module and its variables; got {type(model).__name__}.")
    if model.scope is not None:
        raise FuseError(
            "fuse takes a module that is not bound to variables: give the module itself, not `model.bind(variables)`."
        )
    if hasattr(type(model), "fused_forms"):
        raise FuseError("The network is fused already.")
    return model


def _check_variables(variables: Any) -> Variables:
    if not isinstance(variables, Mapping) and hasattr(variables, "params"):
        raise FuseError(
            f"fuse takes variables; got {type(variables).__name__}, the state of a network in training. Give "
            '{"params": state.params, "batch_stats": state.batch_stats}.'
        )
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        found = listed(list(map(str, variables)), 3) if isinstance(variables, Mapping) else type(variables).__name__
        hint = " Convert a PyTorch state dict with scconv_jax.from_torch." if "." in found else ""
        raise FuseError(
            f'fuse takes variables {{"params": ..., "batch_stats": ...}}, as `model.init` returns them; got {found}.{hint}'
        )
    tree = {name: _plain(part) for name, part in variables.items()}
    if is_fused(tree):
        raise FuseError("The variables are fused already. Give those of the original network.")
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree)):
        raise FuseError("fuse takes variables whose leaves are arrays.")
    return tree


def _plain(tree: Any) -> Any:
    """Return nested dictionaries, also for Flax's FrozenDict."""
    return {name: _plain(part) for name, part in tree.items()} if isinstance(tree, Mapping) else tree


def _example(model: Any, variables: Variables, images: Any) -> tuple[jax.ShapeDtypeStruct, dict[str, bool]]:
    """Return the shape of an input, and the keyword arguments of a call; raise a FuseError if the variables do not fit."""
    options = {"train": False} if "train" in inspect.signature(type(model).__call__).parameters else {}
    inputs = _inputs(model, variables) if images is None else iter([jax.ShapeDtypeStruct(images.shape, images.dtype)])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    first: tuple[Any, Exception] | None = None
    for example in inputs:
        try:
            template = _plain(
                jax.eval_shape(functools.partial(model.init, **options), jax.eval_shape(jax.random.key, 0), example)
            )
        except Exception as error:  # a module of the user's can fail in any way
            first = first or (None, error)
            continue
        if not (problem := difference(template, shapes)):
            return example, options
        if first is None or first[0] is None or len(problem) < len(first[0]):
            first = (problem, FuseError(problem))
    if first is not None and first[0]:
        raise FuseError(f"The variables do not fit the network. {first[0]}")
    reason = f"{first[1]!s:.300}" if first else "none was tried"
    raise FuseError(
        f"No input was found that the network accepts ({reason}). Give one: fuse(model, variables, images), an array or a "
        "jax.ShapeDtypeStruct."
    )


def _inputs(model: Any, variables: Variables) -> Iterator[jax.ShapeDtypeStruct]:
    """Yield shapes of inputs that a network may accept, the likeliest first."""
    dims = dict.fromkeys(size for leaf in jax.tree.leaves(variables["params"]) for size in leaf.shape)
    own = getattr(model, "in_channels", None)
    channels = [own] if isinstance(own, int) else list(dict.fromkeys([3, 1, *dims, *(2 * size for size in dims)]))
    size = getattr(model, "image_size", None)
    sizes = [size] if isinstance(size, int) else [224, 64, 32]
    for c, pixels in itertools.product(channels, sizes):
        yield jax.ShapeDtypeStruct((1, pixels, pixels, c), jnp.float32)
    for c in [] if isinstance(own, int) else channels:
        yield jax.ShapeDtypeStruct((1, c), jnp.float32)


def difference(template: Mapping[str, Any], variables: Mapping[str, Any]) -> str:
    """Return a sentence for each kind of difference between expected and given variables, with the cure, or nothing."""
    want, have = (
        {"/".join(path): tuple(getattr(leaf, "shape", ())) for path, leaf in traverse_util.flatten_dict(dict(tree)).items()}
        for tree in (template, variables)
    )
    missing, unknown = [path for path in want if path not in have], [path for path in have if path not in want]
    other = [f"{path} {have[path]} where it has {want[path]}" for path in want if path in have and want[path] != have[path]]
    if not (missing or unknown or other):
        return ""
    if missing and all(path.startswith("batch_stats/") for path in missing) and "batch_stats" not in variables:
        return "They have no batch_stats: give the running statistics with the parameters."
    parts = []
    if missing:
        parts.append(f"Missing: {listed(missing, 3)}.")
    if unknown:
        parts.append(f"Not in the network: {listed(unknown, 3)}.{did_you_mean(unknown[0], missing, most=1, cutoff=0.8)}")
    if other:
        parts.append(f"Other shapes: {listed(other, 3)}.")
    heads = {path.rsplit("/", 1)[0] for path in want if want[path] != have.get(path)}
    if other and not missing and not unknown and len(heads) == 1:
        parts.append(f"Create the network with the options of its weights (num_classes for the last layer, {heads.pop()}).")
    else:
        parts.append("Give the variables of this network, or create the network that they belong to.")
    return " ".join(parts)


def _fused_variables(plan: Mapping[Path, Form], variables: Variables) -> Variables:
    """Return the variables of the inference form."""
    flat = traverse_util.flatten_dict(variables)
    owned: dict[Path, dict[str, dict[str, Any]]] = {}
    for path, leaf in flat.items():
        owned.setdefault(path[1:-1], {}).setdefault(path[0], {})[path[-1]] = leaf
    new = dict(flat)
    for path, form in plan.items():
        if isinstance(form, Passed):
            leaves: dict[str, Any] = {}
        elif isinstance(form, Folded):
            leaves = form.leaves(owned[path]["params"], owned[form.norm.path] if form.norm else {})
        elif isinstance(form, Affine):
            leaves = form.leaves(owned[path])
        else:
            own = functools.reduce(lambda tree, name: tree[name], path, variables["params"])
            leaves = form.leaves(own, own["PWC1"]["kernel"].shape[2] // own["GWC"]["kernel"].shape[2])
        new = {old: leaf for old, leaf in new.items() if old[1 : len(path) + 1] != path}
        for name, leaf in traverse_util.flatten_dict(leaves).items():
            new["params", *path, *name] = np.asarray(leaf, form.leaf)  # pyright: ignore[reportAttributeAccessIssue]
    return {"params": {}} | traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in new.items()})


def _fused_module(model: nn.Module, plan: Mapping[Path, Form]) -> nn.Module:
    return _construct(type(model), tuple(plan.items()), _fields(model))


def _fields(model: Any) -> dict[str, Any]:
    return {
        field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.init and field.name != "parent"
    }


def _construct(cls: type, plan: tuple[tuple[Path, Form], ...], fields: Mapping[str, Any]) -> nn.Module:
    return _fused_class(cls, plan)(**fields)


@functools.lru_cache(maxsize=64)
def _fused_class(cls: Any, plan: tuple[tuple[Path, Form], ...]) -> Any:
    """Return a subclass whose methods run with the forms of a plan in place of the layers."""
    forms: dict[Path, Any] = dict(plan)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("train"):
                raise ValueError(
                    f"{cls.__name__} is fused for inference and cannot train: call it with train=False. Train the network that "
                    "was given to scconv_jax.fuse, then fuse it again."
                )
            start = len(self.path) if self.scope is not None else 0

            def replace(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
                form = forms.get(context.module.path[start:]) if context.method_name == "__call__" else None
                return next_call(*args, **kwargs) if form is None else form(context.module, *args, **kwargs)

            with nn.intercept_methods(replace):
                return function(self, *args, **kwargs)

        return method

    def body(namespace: dict[str, Any]) -> None:
        names = {
            name
            for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
            for name, value in vars(base).items()
            if isinstance(value, types.FunctionType) and (name == "__call__" or not name.startswith("_"))
        } - {"setup"}
        namespace.update({name: wrapped(inspect.getattr_static(cls, name)) for name in names})
        namespace["__module__"], namespace["__doc__"] = cls.__module__, f"{cls.__name__} in its inference form."
        namespace["fused_forms"] = forms
        namespace["__reduce__"] = lambda self: (_construct, (cls, plan, _fields(self)))

    return types.new_class(f"Fused{cls.__name__}", (cls,), {}, body)
