"""SCNet: residual networks whose bottleneck is built of self-calibrated convolutions.

Paper: Liu, Hou, Cheng, Wang, Feng, "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020,
pp. 10096-10105. Reference implementation: https://github.com/MCG-NKU/SCNet, whose parameter names these are.

    a = ReLU(BN(x ∗ 1×1))       a = ReLU(K1(a))
    b = ReLU(BN(x ∗ 1×1))       b = ReLU(calibrate(b))       y = ReLU(x + BN([a, b] ∗ 1×1))

The SE variants rescale the channels of BN([a, b] ∗ 1×1): Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018.

Differences: none for the networks of which checkpoints were published (scnet50, scnet101, scnet50_v1d). SCNeXt and the SE
variants follow the paper's description; their code was not published, so the SE parameters take timm's names.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.layers.core import BatchNorm, Conv, ConvNorm, Dtype, Factory
from scconv_jax.layers.self_calibrated import SelfCalibration
from scconv_jax.layers.squeeze_excitation import SqueezeExcitation
from scconv_jax.models.blocks import shortcut
from scconv_jax.models.resnet import NARROW, DeepStem, ResNet
from scconv_jax.shapes import Array, Float

POOLING = 4  # r in every published network


class SCBottleneck(nn.Module):
    """Two 1×1, K1 beside the calibrated branch, 1×1 and a shortcut: `(n, h, w, c)` to `(n, h / s, w / s, 4 planes)`.

    Attributes:
        planes: width of the block; each of the two branches has `int(planes * bottleneck_width / 64) * groups` channels.
        strides: s, of K1 and K4, or of the average pool after them (`avd`).
        dilation: of K1 to K4.
        transition: whether the block begins a stage that halves the map, or would, were the network not dilated.
        groups: of K1 to K4.
        bottleneck_width: channels of a branch per group, for planes of 64.
        avd: in a transition, stride by an average pool 3×3 after the branches, not by K1 and K4 ("v1d").
        avg_down: stride in the shortcut by an average pool ("v1d").
        se_reduction: channels over the hidden ones of a `SqueezeExcitation` before the addition; where not given, there is none.
        norm: factory of the norms.
        dtype: of the computation.
    """

    planes: int
    strides: int = 1
    dilation: int = 1
    transition: bool = False
    groups: int = 1
    bottleneck_width: int = 32
    avd: bool = False
    avg_down: bool = False
    se_reduction: int | None = None
    norm: Factory = BatchNorm
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block; `train` is the norms'."""
        features = 4 * self.planes
        width = int(self.planes * self.bottleneck_width / 64) * self.groups
        pools = self.avd and self.transition
        norm = partial(self.norm, dtype=self.dtype)
        pointwise = partial(Conv, kernel_size=1, dtype=self.dtype)
        branch = {
            "features": width,
            "strides": 1 if pools else self.strides,
            "dilation": self.dilation,
            "groups": self.groups,
            "norm": self.norm,
            "dtype": self.dtype,
        }

        a = nn.relu(norm(name="bn1_a")(pointwise(width, name="conv1_a")(x), train=train))
        a = nn.relu(ConvNorm(**branch, name="k1")(a, train=train))
        b = nn.relu(norm(name="bn1_b")(pointwise(width, name="conv1_b")(x), train=train))
        b = nn.relu(SelfCalibration(**branch, pooling=POOLING, name="scconv")(b, train=train))
        if pools:
            a, b = (F.avg_pool(y, 3, self.strides, padding=1) for y in (a, b))

        y = pointwise(features, name="conv3")(jnp.concatenate([a, b], axis=-1))
        y = norm(name="bn3")(y, train=train)
        if self.se_reduction is not None:
            y = SqueezeExcitation(features // self.se_reduction, dtype=self.dtype, name="se")(y)
        x = shortcut(x, features, self.strides, average=self.avg_down, norm=self.norm, dtype=self.dtype, train=train)
        return nn.relu(y + x)


SCNet = partial(ResNet, smallest_map=POOLING)
_V1D = partial(SCBottleneck, avd=True, avg_down=True)
_NEXT = partial(SCBottleneck, groups=32, bottleneck_width=2)
_SE = partial(SCBottleneck, se_reduction=16)

MODELS = {
    "scnet50": partial(SCNet, SCBottleneck, (3, 4, 6, 3)),
    "scnet101": partial(SCNet, SCBottleneck, (3, 4, 23, 3)),
    "scnet50_v1d": partial(SCNet, _V1D, (3, 4, 6, 3), stem=partial(DeepStem, (32, 32, 64))),
    "scnet101_v1d": partial(SCNet, _V1D, (3, 4, 23, 3), stem=partial(DeepStem, (64, 64, 128))),
    "scnext50": partial(SCNet, _NEXT, (3, 4, 6, 3)),
    "scnext101": partial(SCNet, _NEXT, (3, 4, 23, 3)),
    "se_scnet50": partial(SCNet, _SE, (3, 4, 6, 3)),
    "se_scnet101": partial(SCNet, _SE, (3, 4, 23, 3)),
    "scnet20_small": partial(SCNet, SCBottleneck, (2, 2, 2), **NARROW),
}

_ADDRESS = "https://backseason.oss-cn-beijing.aliyuncs.com/scnet/"
PUBLISHED = {
    "scnet50": f"{_ADDRESS}scnet50-dc6a7e87.pth",
    "scnet101": f"{_ADDRESS}scnet101-44c5b751.pth",
    "scnet50_v1d": f"{_ADDRESS}scnet50_v1d-4109d1e1.pth",
}
