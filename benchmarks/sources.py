"""Difference between converted networks and PyTorch's for each source of weights: the table of the page "Bring your weights".

PyTorch modules with the source's keys write each file, with random weights and running statistics. The file is read from disk and
compared with those same modules, stage by stage, as `python -m scconv_jax verify` does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import record, table
from scconv_jax.interop.loading import build_model, open_checkpoint
from scconv_jax.interop.verification import SIZES, compare
from tests.reference.namings import MMPose, PytorchCV, PytorchCVGhostNet
from tests.reference.networks import build
from tests.reference.state import randomise

# Functions that make the networks in PyTorch; this file is its own `--reference`.
scnet50 = partial(build, "scnet50")
scnet50_dilated = partial(build, "scnet50", output_stride=8)
scnet50_v1d = partial(build, "scnet50_v1d")
scnet101 = partial(build, "scnet101")
resnet50 = partial(build, "resnet50")
ghostnet_100 = partial(build, "ghostnet_100")
pytorchcv_scnet50 = partial(PytorchCV, "scnet")
pytorchcv_scneta50 = partial(PytorchCV, "scneta")
pytorchcv_resnet50b = partial(PytorchCV, "resnetb")
pytorchcv_ghostnet = PytorchCVGhostNet
mmpose_scnet50 = MMPose

ONE = SIZES[224][2:]
SOURCES = (  # source, network, output stride, sizes of the images
    ("SCNet's authors", "scnet50", 32, SIZES[224]),
    ("SCNet's authors, dilated", "scnet50_dilated", 8, ONE),
    ("SCNet's authors", "scnet50_v1d", 32, ONE),
    ("SCNet's authors", "scnet101", 32, ONE),
    ("torchvision, timm", "resnet50", 32, ONE),
    ("GhostNet's authors, timm", "ghostnet_100", 32, ONE),
    ("pytorchcv", "pytorchcv_scnet50", 32, ONE),
    ("pytorchcv", "pytorchcv_scneta50", 32, ONE),
    ("pytorchcv", "pytorchcv_resnet50b", 32, ONE),
    ("pytorchcv", "pytorchcv_ghostnet", 32, ONE),
    ("mmpose", "mmpose_scnet50", 32, ONE),
)


def main() -> None:
    """Compare and record."""
    rows = []
    for source in SOURCES:
        rows.append(measure(*source))
        print(*rows[-1], flush=True)
    headings = ["source", "file", "key convention", "network", "images, px", "float64", "float32"]
    text = "Largest difference at any stage and for any kind of image, relative to the largest value of that map.\n\n"
    record("sources", "Sources of weights against PyTorch", text + table(headings, rows))


def measure(source: str, network: str, output_stride: int, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Write a network's file, read it, compare, and return a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{network}.pth"
        torch.save(randomise(globals()[network](), 0).state_dict(), path)
        checkpoint = open_checkpoint(path)
    loaded = build_model(checkpoint, None, {} if output_stride == 32 else {"output_stride": output_stride})
    largest = {"float64": 0.0, "float32": 0.0}
    for difference in compare(checkpoint, loaded, reference=f"{__file__}:{network}", sizes=sizes):
        largest[difference.dtype] = max(largest[difference.dtype], difference.value)
    pixels = ", ".join("×".join(map(str, size)) for size in sizes)
    return [source, path.name, checkpoint.convention.name, loaded.name, pixels, *(f"{value:.1e}" for value in largest.values())]


if __name__ == "__main__":
    main()
