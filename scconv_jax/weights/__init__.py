"""Files of weights, read safely and written whole: PyTorch's `.pth`, `.safetensors`, and the checkpoints of our training runs.

    variables, metadata = load("scnet50.safetensors")

`formats` tells them apart and has what is exported here; `torch_files`, `safetensors_files` and `runs` read one kind each;
`pickles` and `state_dicts` are what PyTorch's files are made of; `download` fetches published ones; `files` has what all need.
Nothing here knows a network.
"""

from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.formats import Loaded, Source, load, read, save

__all__ = ["Loaded", "Source", "WeightsError", "load", "read", "save"]
