"""SCNet: residual networks with self-calibrated convolutions in their bottlenecks.

Paper: Liu, Hou, Cheng, Wang, Feng, "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020,
pp. 10096-10105. Reference implementation: https://github.com/MCG-NKU/SCNet; parameter names are the same.

    a = ReLU(BN(x ∗ 1×1))       a = ReLU(K1(a))
    b = ReLU(BN(x ∗ 1×1))       b = ReLU(calibrate(b))       y = ReLU(x + BN([a, b] ∗ 1×1))

The SE variants rescale the channels of BN([a, b] ∗ 1×1): Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018.

Differences: none for the networks with published checkpoints (scnet50, scnet101, scnet50_v1d). The code of SCNeXt and of the SE
variants was not published: they follow the paper's description, and the SE parameters have timm's names.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from scconv_jax import functional as F
from scconv_jax.functional.convolution import twin_convs
from scconv_jax.layers.core import Conv, ConvNorm
from scconv_jax.layers.self_calibrated import SelfCalibration
from scconv_jax.layers.squeeze_excitation import SqueezeExcitation
from scconv_jax.models.blocks import ResidualBlock
from scconv_jax.models.resnet import NARROW, DeepStem, ResNet
from scconv_jax.models.spec import DILATED, SMALL_IMAGES, ModelSpec, Row
from scconv_jax.shapes import Array, Float

POOLING = 4  # r of every published network


class SCBottleneck(ResidualBlock):
    """The block of SCNet: `(n, h, w, c)` to `(n, h / s, w / s, 4 planes)`, where s is `strides`.

    Source: Liu et al., CVPR 2020.

    Attributes:
        groups: Groups of K1 to K4.
        bottleneck_width: Channels per group of a branch with 64 planes: each of the two branches has
            `int(planes * bottleneck_width / 64) * groups` channels.
        avd: In a transition, a 3×3 average pool after the branches has the stride instead of K1 and K4 ("v1d").
        avg_down: An average pool has the stride of the shortcut ("v1d").
        se_reduction: Output channels divided by the hidden channels of a `SqueezeExcitation` before the addition. If None,
            there is none.
    """

    expansion: ClassVar[int] = 4

    groups: int = 1
    bottleneck_width: int = 32
    avd: bool = False
    avg_down: bool = False
    se_reduction: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n p q d"]:
        """Apply the block. `train` selects the statistics of the norms."""
        features = 4 * self.planes
        width = int(self.planes * self.bottleneck_width / 64) * self.groups
        if width == 0:
            least = -(-64 // self.bottleneck_width)
            raise ValueError(
                f"planes={self.planes} leave no channels for the branches, of {self.bottleneck_width} per group at 64 planes. "
                f"Nearest valid value: {least}."
            )
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

        conv1_a, conv1_b = pointwise(width, name="conv1_a"), pointwise(width, name="conv1_b")
        a, b = conv1_a(x), conv1_b(x)
        if train:  # The same values from one convolution, where that pays. The two above are then unused, and so not computed.
            kernels = (nn.unbox(conv.variables)["params"]["kernel"] for conv in (conv1_a, conv1_b))
            a, b = twin_convs(*(y.astype(a.dtype) for y in (x, *kernels)))
        a = nn.relu(norm(name="bn1_a")(a, train=train))
        a = nn.relu(ConvNorm(**branch, name="k1")(a, train=train))
        b = nn.relu(norm(name="bn1_b")(b, train=train))
        b = nn.relu(SelfCalibration(**branch, pooling=POOLING, name="scconv")(b, train=train))
        if pools:
            a, b = (F.avg_pool(y, 3, self.strides, padding=1) for y in (a, b))

        y = pointwise(features, name="conv3")(jnp.concatenate([a, b], axis=-1))
        y = norm(name="bn3")(y, train=train)
        if self.se_reduction is not None:
            y = SqueezeExcitation(features // self.se_reduction, dtype=self.dtype, name="se")(y)
        return self.join(y, x, train=train, average=self.avg_down)


SCNet = partial(ResNet, smallest_map=POOLING)
"""A `ResNet` for `SCBottleneck` (Liu et al., CVPR 2020): it refuses images whose last map is smaller than the pooling window."""
_V1D = partial(SCBottleneck, avd=True, avg_down=True)
_NEXT = partial(SCBottleneck, groups=32, bottleneck_width=2)
_SE = partial(SCBottleneck, se_reduction=16)
_SIZES50, _SIZES101 = (3, 4, 6, 3), (3, 4, 23, 3)

_WEIGHTS = "https://backseason.oss-cn-beijing.aliyuncs.com/scnet/"
_SCNET = partial(ModelSpec, options=DILATED, counterpart="resnet", conventions=("reference", "pytorchcv", "mmpose"))
_V1D_SPEC = partial(_SCNET, conventions=("reference", "pytorchcv"))
_SPEC = partial(_SCNET, conventions=("reference",))

SPECS = (
    _SCNET(
        "scnet50",
        partial(SCNet, SCBottleneck, _SIZES50),
        weights=_WEIGHTS + "scnet50-dc6a7e87.pth",
        rows=(Row(2020, "SCNet-50", 25.6, 4.0, 77.81),),
    ),
    _SCNET(
        "scnet101",
        partial(SCNet, SCBottleneck, _SIZES101),
        weights=_WEIGHTS + "scnet101-44c5b751.pth",
        rows=(Row(2020, "SCNet-101", 44.6, 7.2, 78.94),),
    ),
    _V1D_SPEC(
        "scnet50_v1d",
        partial(SCNet, _V1D, _SIZES50, stem=partial(DeepStem, (32, 32, 64))),
        weights=_WEIGHTS + "scnet50_v1d-4109d1e1.pth",
        rows=(Row(2020, "SCNet-50 v1d", 25.6, 4.7, 80.47),),
    ),
    _V1D_SPEC("scnet101_v1d", partial(SCNet, _V1D, _SIZES101, stem=partial(DeepStem, (64, 64, 128)))),
    _SPEC("scnext50", partial(SCNet, _NEXT, _SIZES50), rows=(Row(2020, "SCNeXt-50", 25.0, 4.3, 78.3),)),
    _SPEC("scnext101", partial(SCNet, _NEXT, _SIZES101), rows=(Row(2020, "SCNeXt-101", 44.2, 8.0, 79.2),)),
    _SPEC("se_scnet50", partial(SCNet, _SE, _SIZES50), rows=(Row(2020, "SE-SCNet-50", 28.1, 4.0, 78.2),)),
    _SPEC("se_scnet101", partial(SCNet, _SE, _SIZES101), rows=(Row(2020, "SE-SCNet-101", 49.3, 7.2, 78.9),)),
    _SPEC("scnet20_small", partial(SCNet, SCBottleneck, (2, 2, 2), **NARROW), preparation=SMALL_IMAGES),
)
