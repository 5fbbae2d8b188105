"""Explains networks: what they look at, and how the two operators weigh. Functions return arrays; `explain` writes pictures.

scconv_jax.explanation.grad_cam(model, variables, images, layer="layer3")    (n, h, w)

maps.py       grad_cam, receptive_fields, calibration_gates, reconstruction_maps, fusion_weights
capture.py    reads the values inside a network while it is traced
units.py      the SRU's two maps and the CRU's weights
explained.py  explain: all of this for a trained network and image files, by one program
pictures.py, page.py, page.html, report.py    the files that the command `explain` writes
"""

from scconv_jax.explanation.explained import Explained, explain
from scconv_jax.explanation.maps import (
    calibration_gates,
    fusion_weights,
    grad_cam,
    receptive_fields,
    reconstruction_maps,
)
from scconv_jax.explanation.units import Separation

__all__ = [
    "Explained",
    "Separation",
    "calibration_gates",
    "explain",
    "fusion_weights",
    "grad_cam",
    "receptive_fields",
    "reconstruction_maps",
]
