"""Key conventions of public checkpoints, and the rules that rename their keys to ours. The values of arrays play no part.

Our keys are those of a network's reference (see `conversion.py`), so files of the reference code, of torchvision and of timm need
no renaming. The other conventions were read in these sources:

    pytorchcv   https://github.com/osmr/imgclsmob, pytorch/pytorchcv/models: scnet.py, resnet.py, senet.py, ghostnet.py,
                common.py
    mmpose      https://github.com/open-mmlab/mmpose, mmpose/models/backbones/scnet.py; also the two other spellings of a
                convolution and its norm in that family of libraries: conv1.conv with norm1, conv1.conv with conv1.bn
    scconv      https://github.com/cheng-haha/ScConv: shapes and keys distinguish its three versions

Equal keys do not mean equal computation. `REFUSED` lists networks that look like ours and compute something else;
`KeyConvention.caution` warns of differences that a file does not show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scconv_jax.interop.keys import ConversionError, Rename
from scconv_jax.messages import did_you_mean


class KeyConvention(NamedTuple):
    """The keys that one library uses in its state dicts."""

    name: str
    description: str
    patterns: tuple[str, ...]  # regular expressions; a file has this convention if each matches the beginning of some key
    rename: tuple[Rename, ...] = ()
    ignore: tuple[str, ...] = ()  # patterns, after renaming, of entries that belong to another task
    linear: tuple[str, ...] = ()  # entries, after renaming, of 1×1 convolutions that are linear layers here
    caution: str = ""  # warning about a difference that the keys do not show


def _conv_norm(prefix: str, parts: Mapping[str, tuple[str, str]]) -> tuple[Rename, ...]:
    """Return rules for pytorchcv's `NAME.conv` and `NAME.bn` after a prefix. A group in the prefix is kept."""
    kept = r"\g<1>" if "(" in prefix else ""
    return tuple(
        (rf"^{prefix}{re.escape(old)}\.{kind}\.", f"{kept}{new}.")
        for old, pair in parts.items()
        for kind, new in zip(("conv", "bn"), pair, strict=True)
    )


_BLOCK_PARTS = {  # pytorchcv's name for a convolution with its norm, and our names for the two
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
    "identity_block.conv": ("downsample.1", "downsample.2"),  # after an average pool; must come before the next rule
    "identity_block": ("downsample.0", "downsample.1"),
}
_STEM = {"conv1": ("conv1.0", "conv1.1"), "conv2": ("conv1.3", "conv1.4"), "conv3": ("conv1.6", "bn1"), "conv": ("conv1", "bn1")}

_PYTORCHCV = (
    *_conv_norm(r"features\.init_block\.", _STEM),
    (r"^features\.stage(\d+)\.unit(\d+)\.", lambda found: f"layer{found[1]}.{int(found[2]) - 1}."),
    *_conv_norm(r"(layer\d+\.\d+\.)", _BLOCK_PARTS),
    (r"^output\.", "fc."),
)


def _ghost_block(found: re.Match[str]) -> str:
    """Return the prefix of a block: pytorchcv counts the blocks of one map size, GhostNet's authors restart after the first."""
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
    *_conv_norm(r"(blocks\.\d+\.\d+\.)", _GHOST_PARTS),
    *_conv_norm(r"features\.", {"init_block": ("conv_stem", "bn1"), "final_block": ("blocks.9.0.conv", "blocks.9.0.bn1")}),
    *_conv_norm(r"output\.", {"conv1": ("conv_head", "bn_head")}),
    (r"\.body\.se\.conv1\.", ".se.conv_reduce."),
    (r"\.body\.se\.conv2\.", ".se.conv_expand."),
    (r"^output\.conv2\.", "classifier."),
)

CONVENTIONS = (
    KeyConvention(
        "reference",
        "SCNet of MCG-NKU/SCNet",
        (r"layer1\.0\.conv1_a\.weight$", r"layer1\.0\.scconv\.k2\.1\.weight$"),
    ),
    KeyConvention(
        "pytorchcv",
        "SCNet (scneta is v1d) and ResNet-b of osmr/imgclsmob",
        (r"features\.init_block\.", r"features\.stage1\.unit1\.body\.conv1a?\.conv\.weight$"),
        _PYTORCHCV,
    ),
    KeyConvention(
        "pytorchcv-ghostnet",
        "ghostnet of osmr/imgclsmob, here ghostnet_100_pytorchcv",
        (r"features\.init_block\.", r"features\.stage1\.unit1\.body\.exp_conv\.main_conv\."),
        _PYTORCHCV_GHOSTNET,
        linear=("classifier.weight",),
    ),
    KeyConvention(
        "mmpose",
        "SCNet of open-mmlab/mmpose, a backbone",
        (r"(backbone\.)?layer1\.0\.k1\.0\.weight$", r"(backbone\.)?layer1\.0\.conv1\.(conv\.)?weight$"),
        (
            (r"^backbone\.", ""),
            (r"(^|\.)norm(\d)\.", r"\g<1>bn\g<2>."),
            (r"(^|\.)conv(\d)\.(bn|norm)\.", r"\g<1>bn\g<2>."),
            (r"(^|\.)conv(\d)\.conv\.", r"\g<1>conv\g<2>."),
            (r"^(layer\d+\.\d+\.(?:conv|bn)1)\.", r"\g<1>_a."),
            (r"^(layer\d+\.\d+\.(?:conv|bn))2\.", r"\g<1>1_b."),
        ),
        ("keypoint_head.*", "head.*"),
    ),
    KeyConvention(
        "torchvision",
        "torchvision's and timm's ResNet",
        (r"conv1\.weight$", r"layer1\.0\.conv1\.weight$", r"layer1\.0\.bn1\.weight$"),
    ),
    KeyConvention(
        "timm-ghostnet",
        "GhostNet of its authors and of timm",
        (r"conv_stem\.weight$", r"blocks\.0\.0\.ghost1\.primary_conv\.0\.weight$"),
    ),
)  # fmt: skip

OWN = KeyConvention("own", "no known convention", ())
FLAX = KeyConvention("flax", "Flax keys of this project", ())

_CAFFE = (
    "pytorchcv's resnet50b has its stride in the 3×3 convolution, as resnet50 here; pytorchcv's resnet50 has it in the first "
    "1×1, with the same keys, and would give wrong results. Check which of the two the file is."
)

# Networks that look like ours and compute something else: patterns of keys, the network, and the difference.
REFUSED = (
    (
        (r"conv1\.0\.weight$", r"layer1\.0\.conv1\.weight$"),
        "a ResNet-C or -D (for example timm's resnet50d)",
        "Its stem has three 3×3 convolutions; resnet50 and resnet101 here have the paper's 7×7.",
    ),
)


def identify(keys: Iterable[str]) -> KeyConvention:
    """Return the convention of a checkpoint's keys (without prefixes such as `module.`), or `OWN` if none fits.

    A checkpoint that looks like one of our networks and computes something else is an error.
    """
    keys = list(keys)
    for patterns, network, difference in REFUSED:
        if _has(keys, patterns):
            raise ConversionError(f"This looks like {network}. {difference}")
    found = next((convention for convention in CONVENTIONS if _has(keys, convention.patterns)), OWN)
    if found.name == "pytorchcv" and not _has(keys, (r"features\.stage1\.unit1\.body\.conv1a\.",)):
        found = found._replace(caution=_CAFFE)
    return found


def by_name(name: str) -> KeyConvention:
    """Return the convention with this name; a `ConversionError` suggests the nearest one."""
    known = {convention.name: convention for convention in (*CONVENTIONS, OWN)}
    if name not in known:
        hint = did_you_mean(name, known, most=1, cutoff=0.4)
        raise ConversionError(f"There is no key convention {name!r}.{hint} Known conventions: {', '.join(known)}.")
    return known[name]


def _has(keys: Iterable[str], patterns: Iterable[str]) -> bool:
    return all(any(re.match(pattern, key) for key in keys) for pattern in patterns)


def scconv_options(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return `variant` and `alpha` of ScConv, as far as the keys and shapes of a checkpoint show them.

    The paper's form has the same entries as the code of 2023-10. The result is then "2023-10", because public files come from it.
    """
    options: dict[str, Any] = {}
    for key, value in entries.items():
        if re.search(r"(^|\.)SRU\.gn\.gamma$", key):
            options["variant"] = "2023-07"
        elif re.search(r"(^|\.)SRU\.gn\.weight$", key):
            options["variant"] = "2023-09" if len(value.shape) == 3 else "2023-10"
        elif re.search(r"(^|\.)CRU\.squeeze1\.weight$", key):
            other = entries.get(key.replace("squeeze1", "squeeze2"))
            if other is not None and len(value.shape) == len(other.shape) == 4:
                options["alpha"] = value.shape[1] / (value.shape[1] + other.shape[1])
    return options
