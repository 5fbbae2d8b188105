"""`Network`, the base of all networks, and `Stage`, a sequence of blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from itertools import accumulate
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from scconv_jax import functional as F
from scconv_jax.functional.checks import nearest_int
from scconv_jax.layers.base import Layer
from scconv_jax.layers.core import Dense, Dtype, Factory
from scconv_jax.messages import did_you_mean
from scconv_jax.models.complexity import parameter_paths
from scconv_jax.shapes import Array, Float


class Feature(NamedTuple):
    """The map after one stage of a network."""

    channels: int
    stride: int  # image size divided by the size of the map


class Stage(nn.Module):
    """Layers applied in turn, named "0", "1", ... as in PyTorch's `Sequential`."""

    layers: tuple[Factory, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the layers. `train` is passed to each."""
        for i, layer in enumerate(self.layers):
            x = layer(name=str(i))(x, train=train)
        return x


class Network(Layer, kw_only=True):
    """Base class: images `(n, h, w, in_channels)` to logits `(n, num_classes)`.

    Subclasses define `maps`, `feature_info`, `stages` and the parts, with `add_head` as the last.

    Attributes:
        num_classes: Length of the logits. If 0, there is no head, and the network returns what `pooled` returns.
        in_channels: Channels of the images: 3 for RGB, 1 for grey ones.
        dtype: Computation dtype. Results are float32, or float64 for a float64 network.
        axis_name: Mapped axis over which BatchNorm computes its statistics. If None, each device computes its own.
        dropout: Probability that training sets a pooled feature to zero. It then needs `rngs={"dropout": key}`.
        frozen: Stages ("stem", "layer1", ..., "head"), or patterns of module paths (`layer1/0`, `*/bn1`), that training runs as
            evaluation does: their norms use the running statistics and keep them. `frozen_mask` keeps their parameters.
        rematerialise: Whether the backward pass recomputes each block from the output of the block before it, to save memory.
        image_size: Height and width, in pixels, of the images that the network is designed for.
        head: Name of the linear layer.
        param_dtype: See `Layer`.
        kernel_init: See `Layer`.

    Raises:
        ValueError: A value is out of range; the images are not float `(n, h, w, in_channels)`, or smaller than `smallest_image`.
    """

    num_classes: int = 1000
    in_channels: int = 3
    dtype: Dtype = jnp.float32
    axis_name: str | tuple[str, ...] | None = None
    dropout: float = 0.0
    frozen: tuple[str, ...] = ()
    rematerialise: bool = False
    image_size: int = 224
    head: ClassVar[str] = "fc"

    def __post_init__(self) -> None:
        """Check the attributes."""
        for name, lowest, rule in (
            ("num_classes", 0, "0, for no head, or a positive integer"),
            ("in_channels", 1, "one positive integer"),
        ):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, Integral) or number < lowest:
                raise ValueError(f"{name}={number!r} must be {rule}.{nearest_int(number, lowest)}")
        if not isinstance(self.frozen, (tuple, list)) or not all(isinstance(name, str) for name in self.frozen):
            raise ValueError(f"frozen={self.frozen!r} must be a tuple of names, such as ('stem', 'layer1').")
        self.frozen = tuple(self.frozen)
        super().__post_init__()
        if self.frozen:
            self.frozen_paths(self.frozen)

    @property
    def smallest_image(self) -> int:
        """Smallest height and width of the images, in pixels."""
        return 1

    @property
    def num_features(self) -> int:
        """Length of the vector that `pooled` returns, the input of the head."""
        return list(self.feature_info().values())[-1].channels

    @nn.nowrap
    def feature_info(self) -> dict[str, Feature]:
        """Return channels and stride of each map that `features` returns."""
        raise NotImplementedError

    @nn.nowrap
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Return the paths of each stage's modules: `{"stem": ("conv1", "bn1"), "layer1": ("layer1",), ..., "head": ("fc",)}`."""
        raise NotImplementedError

    @nn.nowrap
    def frozen_paths(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the patterns of module paths that stages and patterns of paths stand for.

        Raises:
            ValueError: A name is no stage, and the network has no module or parameter with such a path.
        """
        stages, paths = self.stages(), []
        modules = [path for found in stages.values() for path in found]
        for name in names:
            if name not in stages and name not in modules and not any(path_matches(path, [name]) for path in self._paths()):
                hint = did_you_mean(name, dict.fromkeys([*stages, *modules, *("/".join(path[:-1]) for path in self._paths())]))
                raise ValueError(
                    f"frozen: the network has no stage or module {name!r}.{hint} Stages: {', '.join(stages)}; patterns of paths, "
                    "such as layer1/0 or */bn1, name modules."
                )
            paths += stages.get(name, (name,))
        return tuple(paths)

    @nn.nowrap
    def _paths(self) -> list[tuple[str, ...]]:
        """Return the path of each parameter. Every call of a network makes a copy of it: equal ones share the paths."""
        unfrozen: Any = self.clone(frozen=(), parent=None, name=None)  # a network is hashable, unless it is bound
        return _parameter_paths(unfrozen)

    @nn.nowrap
    def check_params(self, params: Mapping[str, Any]) -> None:
        """Raise a ValueError unless parameters have the modules of all stages, the head perhaps left out."""
        modules = {path.partition("/")[0] for stage, paths in self.stages().items() if stage != "head" for path in paths}
        if missing := sorted(modules - params.keys()):
            raise ValueError(
                f"The variables are of another network than {type(self).__name__}: they have no {', '.join(missing)}."
            )

    @nn.nowrap
    def add_head(self) -> None:
        """Create the dropout and the linear layer, if there are any. `setup` calls this last."""
        if self.dropout:
            self.drop = nn.Dropout(self.dropout)
        if self.num_classes:
            setattr(self, self.head, Dense(self.num_classes, dtype=self.dtype))

    def maps(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage by name, for `features`."""
        raise NotImplementedError

    def features(self, images: Float[Array, "n h w i"], *, train: bool) -> dict[str, Float[Array, "n p q d"]]:
        """Return the map after each stage by name: `{"layer1": (n, h / 4, w / 4, 256), ...}`; see `feature_info`."""
        with self._options_of_training(train):
            if not (train and self.rematerialise):
                return self.maps(images, train=train)
            policy = jax.checkpoint_policies.save_only_these_names("block")
            maps: Any = nn.remat(lambda network, images: network.maps(images, train=True), policy=policy)
            return maps(self, images)

    @nn.nowrap
    def _options_of_training(self, train: bool) -> AbstractContextManager[None]:
        """Return a context in which calls of modules follow `frozen` and `rematerialise`."""
        if not train or not (self.frozen or self.rematerialise):
            return nullcontext()
        depth, frozen = len(self.path), self.frozen_paths(self.frozen)

        def call(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if context.method_name != "__call__":
                return next_call(*args, **kwargs)
            path = context.module.path[depth:]
            if kwargs.get("train") and path_matches(path, frozen):
                kwargs = {**kwargs, "train": False}
            result = next_call(*args, **kwargs)
            if self.rematerialise and len(path) == 2:  # a block: layer1/0
                result = jax.tree.map(lambda x: checkpoint_name(x, "block"), result)
            return result

        return nn.intercept_methods(call)

    def pool(self, last: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n d"]:
        """Return the input of the linear layer, given the last map: its average."""
        del train
        return F.global_avg_pool(last)

    def pooled(self, images: Float[Array, "n h w i"], *, train: bool) -> Float[Array, "n d"]:
        """Return the input of the linear layer, a feature vector: `(n, num_features)`."""
        return self._result(self._pooled(images, train=train))

    def __call__(self, images: Float[Array, "n h w i"], *, train: bool) -> Float[Array, "n classes"]:
        """Return the logits. `train=True` normalises by the batch's statistics and needs `mutable=["batch_stats"]`."""
        x = self._pooled(images, train=train)
        if self.dropout:
            x = self.drop(x, deterministic=not train)
        return self._result(getattr(self, self.head)(x) if self.num_classes else x)

    def _pooled(self, images: Float[Array, "n h w i"], *, train: bool) -> Float[Array, "n d"]:
        *_, last = self.features(images, train=train).values()
        with self._options_of_training(train):
            return self.pool(last, train=train)

    @nn.nowrap
    def _result(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))


@functools.lru_cache(maxsize=32)
def _parameter_paths(network: Network) -> list[tuple[str, ...]]:
    return parameter_paths(network, network.smallest_image)


def path_matches(path: Sequence[str], patterns: Iterable[str]) -> bool:
    """Return whether a path of modules (`("layer1", "0", "bn1")`), or the path of a module around it, matches a pattern."""
    above = list(accumulate(path, "{}/{}".format))
    return any(fnmatchcase(module, pattern) for pattern in patterns for module in above)


class SmallNetwork(Network, kw_only=True):
    """A network with defaults for small images."""

    num_classes: int = 10
    image_size: int = 32
