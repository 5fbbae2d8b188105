"""Networks by name: `create_model`, `list_models`; their blocks and trunks to build others from."""

from scconv_jax.models.blocks import BasicBlock, Bottleneck
from scconv_jax.models.densenet import DenseNet
from scconv_jax.models.ghostnet import GhostNet
from scconv_jax.models.registry import create_model, list_models
from scconv_jax.models.resnet import ResNet
from scconv_jax.models.scnet import SCBottleneck, SCNet
from scconv_jax.models.wide_resnet import WideResNet

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "DenseNet",
    "GhostNet",
    "ResNet",
    "SCBottleneck",
    "SCNet",
    "WideResNet",
    "create_model",
    "list_models",
]
