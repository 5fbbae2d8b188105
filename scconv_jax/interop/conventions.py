"""What the entries of public checkpoints are called, and how those names become ours: names alone, no arrays' values.

A network's own names here are its reference's (see `convert.py`), so files of the reference code, of torchvision and of timm need
no renaming. The others' names were read off their sources:

    pytorchcv   https://github.com/osmr/imgclsmob, pytorch/pytorchcv/models: scnet.py, resnet.py, senet.py, ghostnet.py,
                common.py
    mmpose      https://github.com/open-mmlab/mmpose, mmpose/models/backbones/scnet.py; also in the two other ways in which that
                family of libraries calls a convolution and its norm: conv1.conv with norm1, conv1.conv with conv1.bn
    scconv      https://github.com/cheng-haha/ScConv, by the shapes and names that tell its three versions apart

Equal names do not mean equal computation. What is known to compute something else than any network here, under names and shapes
that could be taken for one of ours, is in `REFUSED`; what files cannot tell at all is in `Naming.caution`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scconv_jax.interop.conversion import ConversionError, Rename


class Naming(NamedTuple):
    """One convention: how to tell it, and what turns its names into ours."""

    name: str
    description: str
    marks: tuple[str, ...]  # regular expressions; a file has this naming if each matches the beginning of some entry
    rename: tuple[Rename, ...] = ()
    ignore: tuple[str, ...] = ()  # patterns, after renaming, of entries that belong to another task
    linear: tuple[str, ...] = ()  # entries, after renaming, of 1×1 convolutions that are linear layers here
    caution: str = ""  # what the names do not tell


def _layers(parts: Mapping[str, str]) -> tuple[Rename, ...]:
    """Rules for modules within a block: old name to new."""
    return tuple((rf"^(layer\d+\.\d+\.){re.escape(old)}\.", rf"\g<1>{new}.") for old, new in parts.items())


_CONV_NORM = {  # a convolution and its norm, in pytorchcv's blocks
    "body.conv1a": ("conv1_a", "bn1_a"),
    "body.conv2a": ("k1.0", "k1.1"),
    "body.conv1b": ("conv1_b", "bn1_b"),
    "body.conv2b.down.conv": ("scconv.k2.1", "scconv.k2.2"),
    "body.conv2b.conv1": ("scconv.k3.0", "scconv.k3.1"),
    "body.conv2b.conv2": ("scconv.k4.0", "scconv.k4.1"),
    "body.conv1": ("conv1", "bn1"),
    "body.conv2": ("conv2", "bn2"),
    "body.conv3": ("conv3", "bn3"),
    "identity_conv": ("downsample.0", "downsample.1"),
    "identity_block.conv": ("downsample.1", "downsample.2"),  # after an average pool; must stand before the next
    "identity_block": ("downsample.0", "downsample.1"),
}
_STEM = {"conv1": ("conv1.0", "conv1.1"), "conv2": ("conv1.3", "conv1.4"), "conv3": ("conv1.6", "bn1"), "conv": ("conv1", "bn1")}

_PYTORCHCV = (
    *(
        (rf"^features\.init_block\.{re.escape(old)}\.{kind}\.", f"{new}.")
        for old, pair in _STEM.items()
        for kind, new in zip(("conv", "bn"), pair, strict=True)
    ),
    (r"^features\.stage(\d+)\.unit(\d+)\.", lambda found: f"layer{found[1]}.{int(found[2]) - 1}."),
    *_layers({f"{old}.{kind}": new for old, pair in _CONV_NORM.items() for kind, new in zip(("conv", "bn"), pair, strict=True)}),
    (r"^output\.", "fc."),
)


def _ghost_block(found: re.Match[str]) -> str:
    """Number of a block: pytorchcv counts within maps of a size, GhostNet's authors begin anew after the first of a size."""
    stage, unit = int(found[1]), int(found[2])
    number, block = (2 * stage - 3, 0) if unit == 1 else (2 * stage - 2, unit - 2)
    return f"blocks.{max(number, 0)}.{block}."


_GHOST_PARTS = {
    "body.exp_conv.main_conv": ("ghost1.primary_conv.0", "ghost1.primary_conv.1"),
    "body.exp_conv.cheap_conv": ("ghost1.cheap_operation.0", "ghost1.cheap_operation.1"),
    "body.pw_conv.main_conv": ("ghost2.primary_conv.0", "ghost2.primary_conv.1"),
    "body.pw_conv.cheap_conv": ("ghost2.cheap_operation.0", "ghost2.cheap_operation.1"),
    "body.dw_conv": ("conv_dw", "bn_dw"),
    "identity_conv.dw_conv": ("shortcut.0", "shortcut.1"),
    "identity_conv.pw_conv": ("shortcut.2", "shortcut.3"),
}
_PYTORCHCV_GHOSTNET = (
    (r"^features\.stage(\d+)\.unit(\d+)\.", _ghost_block),
    *(
        (rf"^(blocks\.\d+\.\d+\.){re.escape(old)}\.{kind}\.", rf"\g<1>{new}.")
        for old, pair in _GHOST_PARTS.items()
        for kind, new in zip(("conv", "bn"), pair, strict=True)
    ),
    (r"\.body\.se\.conv1\.", ".se.conv_reduce."),
    (r"\.body\.se\.conv2\.", ".se.conv_expand."),
    (r"^features\.init_block\.conv\.", "conv_stem."),
    (r"^features\.init_block\.bn\.", "bn1."),
    (r"^features\.final_block\.conv\.", "blocks.9.0.conv."),
    (r"^features\.final_block\.bn\.", "blocks.9.0.bn1."),
    (r"^output\.conv1\.conv\.", "conv_head."),
    (r"^output\.conv1\.bn\.", "bn_head."),
    (r"^output\.conv2\.", "classifier."),
)

NAMINGS = (
    Naming(
        "reference",
        "SCNet of MCG-NKU/SCNet",
        (r"layer1\.0\.conv1_a\.weight$", r"layer1\.0\.scconv\.k2\.1\.weight$"),
    ),
    Naming(
        "pytorchcv",
        "SCNet (scneta is v1d) and ResNet-b of osmr/imgclsmob",
        (r"features\.init_block\.", r"features\.stage1\.unit1\.body\.conv1a?\.conv\.weight$"),
        _PYTORCHCV,
    ),
    Naming(
        "pytorchcv-ghostnet",
        "ghostnet of osmr/imgclsmob, which is ghostnet_100_pytorchcv here",
        (r"features\.init_block\.", r"features\.stage1\.unit1\.body\.exp_conv\.main_conv\."),
        _PYTORCHCV_GHOSTNET,
        linear=("classifier.weight",),
    ),
    Naming(
        "mmpose",
        "SCNet of open-mmlab/mmpose, a backbone",
        (r"(backbone\.)?layer1\.0\.k1\.0\.weight$", r"(backbone\.)?layer1\.0\.conv1\.(conv\.)?weight$"),
        (
            (r"^backbone\.", ""),
            (r"(^|\.)norm(\d)\.", r"\g<1>bn\g<2>."),
            (r"(^|\.)conv(\d)\.(bn|norm)\.", r"\g<1>bn\g<2>."),
            (r"(^|\.)conv(\d)\.conv\.", r"\g<1>conv\g<2>."),
            *_layers({"conv1": "conv1_a", "bn1": "bn1_a", "conv2": "conv1_b", "bn2": "bn1_b"}),
        ),
        ("keypoint_head.*", "head.*"),
    ),
    Naming(
        "torchvision",
        "torchvision's and timm's ResNet",
        (r"conv1\.weight$", r"layer1\.0\.conv1\.weight$", r"layer1\.0\.bn1\.weight$"),
    ),
    Naming(
        "timm-ghostnet",
        "GhostNet of its authors and of timm",
        (r"conv_stem\.weight$", r"blocks\.0\.0\.ghost1\.primary_conv\.0\.weight$"),
    ),
)  # fmt: skip

OWN = Naming("own", "of no convention that is known here", ())
FLAX = Naming("flax", "Flax's, as this project writes them", ())

_CAFFE = (
    "pytorchcv's resnet50b strides in the 3×3 convolution, as the network here does; its resnet50 strides in the first 1×1, has "
    "the same entries, and would give wrong results. Check which of the two the file is."
)

# Kinds that look like ours: marks, what it looks like, and why it is none of ours.
REFUSED = (
    (
        (r"conv1\.0\.weight$", r"layer1\.0\.conv1\.weight$"),
        "a ResNet-C or -D (timm's resnet50d, say)",
        "It has a stem of three 3×3 convolutions; resnet50 and resnet101 here have the 7×7 of the paper.",
    ),
)


def recognise(names: Iterable[str]) -> Naming:
    """Say whose names a checkpoint's are.

    Args:
        names: of its entries, without `module.`.

    Returns:
        One of `NAMINGS`, or `OWN` where none fits: then the names are taken as they are.

    Raises:
        ConversionError: for a kind of checkpoint that looks like one of ours and computes something else.
    """
    names = list(names)
    for marks, what, why in REFUSED:
        if _has(names, marks):
            raise ConversionError(f"This looks like {what}. {why}")
    found = next((naming for naming in NAMINGS if _has(names, naming.marks)), OWN)
    if found.name == "pytorchcv" and not _has(names, (r"features\.stage1\.unit1\.body\.conv1a\.",)):
        found = found._replace(caution=_CAFFE)
    return found


def naming(name: str) -> Naming:
    """Return the naming called `name`; a `ConversionError` names the nearest where there is none."""
    known = {naming.name: naming for naming in (*NAMINGS, OWN)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConversionError(f"There is no naming {name!r}.{hint} There are: {', '.join(known)}.")
    return known[name]


def _has(names: Iterable[str], marks: Iterable[str]) -> bool:
    return all(any(re.match(mark, name) for name in names) for mark in marks)


def scconv_options(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Read α and the version of ScConv off a checkpoint's names and shapes, wherever in it the layers stand.

    Args:
        entries: name to array, or to what has its shape.

    Returns:
        `{"variant": ..., "alpha": ...}`, each where the entries tell; empty for a checkpoint without ScConv. The paper's form
        has the entries of the code of 2023-10 and cannot be told from it; taken is the code, which public files come from.
    """
    options: dict[str, Any] = {}
    for name, value in entries.items():
        if re.search(r"(^|\.)SRU\.gn\.gamma$", name):
            options["variant"] = "2023-07"
        elif re.search(r"(^|\.)SRU\.gn\.weight$", name):
            options["variant"] = "2023-09" if len(value.shape) == 3 else "2023-10"
        elif re.search(r"(^|\.)CRU\.squeeze1\.weight$", name):
            other = entries.get(name.replace("squeeze1", "squeeze2"))
            if other is not None and len(value.shape) == len(other.shape) == 4:
                options["alpha"] = value.shape[1] / (value.shape[1] + other.shape[1])
    return options
