"""Reports on networks: `summary` and `count_parameters`, the papers' tables with our counts, and the page of all networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from scconv_jax.functional.checks import check_positive_int
from scconv_jax.models.complexity import Part, summarise, total
from scconv_jax.models.registry import MODELS, create_model
from scconv_jax.models.spec import ModelSpec, Row

PAPERS = {2020: "SC-Conv (Liu et al., CVPR 2020)", 2023: "ScConv (Li et al., CVPR 2023)"}
HEADINGS = ("part", "kind", "output", "parameters", "share", "multiply-adds", "share")


class Summary(NamedTuple):
    """The size of a network, part by part. Printing it shows a table."""

    name: str
    size: tuple[int, int]  # height and width of the images, in pixels
    parts: tuple[Part, ...]  # in the order in which they run

    @property
    def title(self) -> str:
        """Name of the network and size of the images."""
        return f"{self.name}, {self.size[0]}×{self.size[1]} px"

    @property
    def total(self) -> Part:
        """The whole network as one part."""
        return total(self.parts)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table below `HEADINGS`, the total last."""
        whole = self.total
        return [
            (
                part.name,
                part.kind,
                "×".join(map(str, part.output[1:])),
                f"{part.parameters:,}",
                f"{part.parameters / max(whole.parameters, 1):.1%}",
                f"{part.multiply_adds:,}",
                f"{part.multiply_adds / max(whole.multiply_adds, 1):.1%}",
            )
            for part in (*self.parts, whole)
        ]

    def __str__(self) -> str:
        """Return the table as text."""
        rows = [HEADINGS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        return "\n".join([self.title, lines[0].rstrip(), rule, *lines[1:-1], rule, lines[-1]])

    __repr__ = __str__


def summary(model: str | nn.Module, size: int | tuple[int, int] | None = None, *, depth: int = 2, **options: Any) -> Summary:
    """Return parameters, multiply-adds and output shape of each part of a network, from shapes alone.

    Args:
        model: Name of a network, a network, or another Flax module called as `model(images, train=...)`. A layer of this library
            is given maps of `features` channels.
        size: Height and width of the images, in pixels, or one number for both. If None, the size that the network was designed
            for, or 224 if it says none.
        depth: Depth of submodules to list: 1 for a network's stages, 2 for their blocks.
        **options: Options of `create_model`, if `model` is a name.

    Returns:
        A `Summary`: `print(summary("scnet50"))` shows the table, `.parts` and `.total` hold the numbers.

    Raises:
        TypeError: `model` is no name and no Flax module.
        ValueError: There is no such network or option, or a number is not positive.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    check_positive_int(height=height, width=width, depth=depth)
    name, module = _named(model, options)
    height, width = (number or getattr(module, "image_size", 224) for number in (height, width))
    return Summary(name, (height, width), tuple(summarise(module, (height, width), depth)))


def count_parameters(model: str | nn.Module | Mapping[str, Any], **options: Any) -> int:
    """Return the number of parameters, without running statistics.

    Args:
        model: Name of a network, a network, variables `{"params": ..., "batch_stats": ...}`, or parameters alone.
        **options: Options of `create_model`, if `model` is a name.

    Raises:
        TypeError: `model` is none of these.
        ValueError: There is no such network or option.
    """
    if isinstance(model, Mapping):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.get("params", model)))
    _, module = _named(model, options)
    return total(summarise(module, depth=1)).parameters


def _named(model: str | nn.Module, options: Mapping[str, Any]) -> tuple[str, nn.Module]:
    if isinstance(model, str):
        return model, create_model(model, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: a module already has its options. Give the network's name to set them.")
    if not isinstance(model, nn.Module):
        hint = " For variables, use count_parameters." if isinstance(model, Mapping) else ""
        raise TypeError(f"Expected the name of a network, a network or another Flax module; got {type(model).__name__}.{hint}")
    return type(model).__name__, model


def _rows() -> list[tuple[ModelSpec, Row]]:
    """Return the rows of the papers' tables, each network without ScConv before the same network with it."""
    groups: dict[tuple[int, int, str], list[tuple[ModelSpec, Row]]] = {}
    for spec in MODELS.values():
        for row in spec.rows:
            groups.setdefault((row.paper, spec.image_size, row.label.partition(",")[0]), []).append((spec, row))
    return [row for key in sorted(groups, key=lambda key: (key[0], -key[1])) for row in groups[key]]


def paper_records() -> Iterator[dict[str, Any]]:
    """Yield each row of the papers' tables with our counts, in millions and billions."""
    for spec, row in _rows():
        # The record keeps its counts, so a second row or report need not trace the network again.
        whole = total(summarise(create_model(spec.name, **row.options), depth=1)) if row.options else spec
        parameters, multiply_adds = whole.parameters / 1e6, whole.multiply_adds / 1e9
        yield {
            "paper": row.paper,
            "network": row.label,
            "model": spec.name,
            "size": spec.image_size,
            "parameters_paper": row.parameters,
            "parameters": parameters,
            "parameters_percent": _percent(parameters, row.parameters),
            "multiply_adds_paper": row.multiply_adds,
            "multiply_adds": multiply_adds,
            "multiply_adds_percent": _percent(multiply_adds, row.multiply_adds),
            "margins_percent": row.margins,
            "top1_paper": row.top1,
            "note": row.reason,
        }


def _percent(ours: float, paper: float) -> float:
    return round(100 * (ours / paper - 1), 2)


def paper_cells(record: dict[str, Any]) -> dict[str, str]:
    """Return one row of a paper's table by heading."""
    return {
        "network": record["network"],
        "model": record["model"],
        "px": str(record["size"]),
        "params, paper": f"{record['parameters_paper']:.2f}",
        "params, ours": f"{record['parameters']:.2f}",
        "params, %": f"{record['parameters_percent']:+.1f}",
        "m-adds, paper": f"{record['multiply_adds_paper']:.3g}",
        "m-adds, ours": f"{record['multiply_adds']:.3g}",
        "m-adds, %": f"{record['multiply_adds_percent']:+.1f}",
        "within %": " / ".join(f"{margin:g}" for margin in record["margins_percent"]),
        "top-1, paper": f"{record['top1_paper']:.2f}",
        "note": record["note"],
    }


_USE = """\
## What a network can do

```python
import jax
import jax.numpy as jnp
import optax

import scconv_jax

options = {"num_classes": 10, "drop_path": 0.1, "dropout": 0.2, "frozen": ("stem", "layer1")}
model = scconv_jax.create_model("resnet20_small", **options)
images = jnp.zeros((2, 32, 32, 3))
variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))

logits = model.apply(variables, images, train=False)
# The input of the head, (2, model.num_features), and the map of each stage, {"layer1": (2, 32, 32, 64), ...}
vector = model.apply(variables, images, train=False, method="pooled")
maps = model.apply(variables, images, train=False, method="features")

# Dropout and stochastic depth need a key in training.
# The norms of frozen stages keep their running statistics.
call = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
logits, new = model.apply(variables, images, **call)

# optax keeps the parameters of frozen stages, with weight decay and momentum too.
mask = scconv_jax.frozen_mask(model, variables["params"])
optimizer = optax.selective_transform(optax.sgd(0.01, momentum=0.9), freeze_mask=mask)

# Another head. 0 removes it: the network then returns `vector`.
model, variables = scconv_jax.reset_classifier(model, variables, 100)
print(scconv_jax.summary(model, 32, depth=1), scconv_jax.count_parameters(variables))
```

Each network has the stages `stem`, `layer1`, `layer2`, ..., `head`; `model.stages()` gives their modules, and
`model_info(NAME).classifier` the name of the head. `rematerialise=True` saves memory in training: the backward pass recomputes
each block. `create_model` returns no weights, because Flax keeps them outside of a network: `load_model(NAME)` returns both.
`fuse(model, variables)` returns the network's inference form with its variables: equal outputs, fewer operations, no training
([speed](performance.md)).
"""


def networks_page() -> Iterator[str]:
    """Yield the lines of docs/networks.md."""
    yield "# Networks\n"
    yield "<!-- Do not edit: `python -m scconv_jax summary --markdown > docs/networks.md` writes this page. -->\n"
    yield (
        "`scconv_jax.create_model(NAME)` returns a network. `scconv_jax.model_info(NAME)` returns its record, from which this\n"
        "page is made, and `scconv_jax.feature_info(NAME)` the channels and strides of its maps.\n"
        '`scconv_jax.list_models("scnet*", pretrained=True)` lists the names that match a pattern and have published weights.\n'
    )
    yield _USE
    for size, title in ((224, "For ImageNet"), (32, "For small images")):
        specs = [spec for spec in MODELS.values() if spec.image_size == size]
        images = specs[0].preparation
        yield f"## {title}\n"
        yield (
            f"Test images: resize the shorter side to {images.resize} px, crop the central {images.size}×{images.size} px,\n"
            f"subtract the mean {images.mean} and divide by the standard deviation {images.std}.\n"
        )
        yield from _table(
            {
                "network": f"`{spec.name}`",
                "parameters": f"{spec.parameters:,}",
                "multiply-adds": f"{spec.multiply_adds / 1e9:.3g} G",
                "smallest image": f"{spec.smallest_image} px",
                "channels / stride of each map": ",\u00a0".join(
                    f"{channels}/{stride}" for channels, stride in spec.features.values()
                ),
                "key conventions": ", ".join(spec.conventions) or "its own",
            }
            for spec in specs
        )
    yield "## Options\n"
    yield "`create_model(NAME, option=value)` and `load_model` take them.\n"
    meanings = {option: meaning for spec in MODELS.values() for option, meaning in spec.options.items()}
    yield from _table(
        {"option": f"`{option}`", "meaning": meaning, "networks": _owners(option)} for option, meaning in meanings.items()
    )
    yield "## Published weights\n"
    yield "`scconv_jax.load_model(NAME)` downloads them and checks their SHA-256.\n"
    published = [spec for spec in MODELS.values() if spec.weights]
    yield from _table(
        {"network": f"`{spec.name}`", "SHA-256": f"{spec.sha256}…", "address": f"<{spec.weights}>"} for spec in published
    )
    yield "## The papers' tables\n"
    yield (
        "Counts are the paper's, ours, and in brackets the difference in percent. Multiply-adds follow the papers:\n"
        "convolutions, linear layers and the scales of norms; additions, activations, pooling and gates are excluded. Top-1\n"
        "accuracy is the paper's: on CIFAR-100 at 32 px for the names that end in `_small`, on ImageNet at 224 px for the\n"
        "others. The last column gives the reason for a difference, and the limits of a test for both differences.\n"
    )
    records = list(paper_records())
    for year, title in PAPERS.items():
        yield f"### {title}\n"
        yield from _table(
            {
                "network": record["network"],
                "name": f"`{record['model']}`",
                "parameters, millions": _both("parameters", record, ".2f"),
                "multiply-adds, billions": _both("multiply_adds", record, ".3g"),
                "top\u20111, %": f"{record['top1_paper']:.2f}",
                "reason (limits)": f"{record['note']} ({' / '.join(f'{margin:g}' for margin in record['margins_percent'])} %)",
            }
            for record in records
            if record["paper"] == year
        )


def _owners(option: str) -> str:
    """Return the networks that have an option: all, all but some, all of one prefix, or their names."""
    owners = [name for name, spec in MODELS.items() if option in spec.options]
    others = [name for name in MODELS if name not in owners]
    prefix = owners[0].partition("_")[0] + "_"
    if owners == [name for name in MODELS if name.startswith(prefix)]:
        return f"`{prefix}*`"
    fewer = owners if len(owners) <= len(others) else others
    pairs = {f"scconv_{name}": f"*{name}" for name in fewer if f"scconv_{name}" in fewer}  # a network and its ScConv form
    named = ", ".join(f"`{pairs.get(f'scconv_{name}', name)}`" for name in fewer if name not in pairs)
    return "all" if not others else named if fewer is owners else f"all but {named}"


def _both(count: str, record: dict[str, Any], form: str) -> str:
    """Return the paper's count, ours, and the difference in percent, without a line break."""
    percent = f"{record[f'{count}_percent']:+.1f}"
    percent = "0.0" if percent in ("+0.0", "-0.0") else percent.replace("-", "−")
    return f"{record[f'{count}_paper']:{form}} → {record[count]:{form}} ({percent})".replace(" ", "\u00a0")


def _table(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """Yield a table in Markdown, given the cells of each row by heading."""
    rows = list(rows)
    for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        yield f"| {' | '.join(cells)} |"
    yield ""
