"""Files of weights: PyTorch's `.pth`, `.safetensors` and the checkpoints of training runs, read to named NumPy arrays.

`formats.read` recognises the format; `torch_files`, `safetensors_files` and `runs` each read one, `hub` finds a folder's files.
`pickles` and `state_dicts` read the pickle inside PyTorch's files, `selection` chooses one of several sets of weights. `download`
fetches published weights. Nothing here knows a network.
"""

from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.formats import Source, read

__all__ = ["Source", "WeightsError", "read"]
