"""The networks, and the blocks and classes for building new ones.

- By name: `create_model`, `list_models`; `model_info` returns a network's record, a `ModelSpec`, and `feature_info`
  the channels and strides of its maps.
- Residual networks with any block: `ResNet`, with the blocks `Bottleneck`, `BasicBlock` and `SCBottleneck` (self-calibrated);
  `SCNet` is a `ResNet` that checks the image size for `SCBottleneck`. `ResNet(block, stage_sizes, **NARROW)` is a network for
  small images.
- Other networks: `WideResNet`, `DenseNet`, `GhostNet`. `Network` is the base of all.

    block = functools.partial(Bottleneck, conv=scconv_jax.ScConv)
    model = ResNet(block, stage_sizes=(3, 4, 6, 3), num_classes=10)
"""

from scconv_jax.models.blocks import BasicBlock, Bottleneck
from scconv_jax.models.densenet import DenseNet
from scconv_jax.models.ghostnet import GhostNet
from scconv_jax.models.network import Feature, Network
from scconv_jax.models.registry import create_model, feature_info, list_models, model_info
from scconv_jax.models.resnet import NARROW, ResNet
from scconv_jax.models.scnet import SCBottleneck, SCNet
from scconv_jax.models.spec import ModelSpec
from scconv_jax.models.wide_resnet import WideResNet

__all__ = [
    "NARROW",
    "BasicBlock",
    "Bottleneck",
    "DenseNet",
    "Feature",
    "GhostNet",
    "ModelSpec",
    "Network",
    "ResNet",
    "SCBottleneck",
    "SCNet",
    "WideResNet",
    "create_model",
    "feature_info",
    "list_models",
    "model_info",
]
