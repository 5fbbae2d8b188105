"""Reads and writes the pickle of a PyTorch state dict without PyTorch. Tensors are views of storages.

References: https://github.com/pytorch/pytorch/blob/main/torch/_utils.py and
https://github.com/pytorch/pytorch/blob/main/torch/serialization.py.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from scconv_jax.weights.files import WeightsError
from scconv_jax.weights.pickles import Global, Placeholder, ordered_dict, unpickle

_MAX_AXES = 32

DTYPES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}

WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net")
"""Keys under which training scripts store the state dict; the first that is present counts."""


class Storage(NamedTuple):
    """A one-dimensional array that tensors are views of."""

    key: str
    dtype: np.dtype
    length: int  # elements

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.length * self.dtype.itemsize


class Tensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool  # PyTorch's negative bit: the values are the storage's with the sign flipped


class Pickled(NamedTuple):
    """An unpickled value with `Tensor` for tensors, its storages by key, and the offset at which the pickle ends."""

    value: Any
    storages: dict[str, Storage]
    end: int


def read_pickle(data: bytes, start: int = 0) -> Pickled:
    """Read the pickle of a state dict or checkpoint. Names other than those in `ADMITTED` are an error."""
    storages: dict[str, Storage] = {}

    def load_persistent(identifier: Any) -> Storage:
        storage = _storage(identifier)
        if storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"its storage {storage.key} is described in two ways")
        return storage

    value, end = unpickle(data, start, ADMITTED, load_persistent, _explain_refusal)
    return Pickled(value, storages, end)


def _storage(identifier: Any) -> Storage:
    """Return the storage for a persistent identifier: ("storage", class, key, device, number of elements)."""
    match identifier:
        case ("storage", Global(name=kind), str(key), _, int(count), *view) if count >= 0:
            if view not in ([], [None]):
                raise WeightsError("it has views of storages, which PyTorch before 0.4 wrote; save it again with a later version")
            if kind not in DTYPES:
                raise WeightsError(f"it has a storage of {kind}; those that can be read are {', '.join(DTYPES)}")
            return Storage(key, DTYPES[kind], count)
        case _:
            raise WeightsError("it refers to something that is not a storage")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers):
        raise WeightsError("it has a tensor with an invalid storage, or an invalid number among its offset, sizes or strides")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES or math.prod(max(size, 1) for size in shape) >= 1 << 50:
        raise WeightsError(f"it has a tensor of sizes {shape} and strides {strides}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.length:
        raise WeightsError(f"it has a tensor that reaches to element {last:,} of a storage of {storage.length:,}")
    flags = others[2] if len(others) > 2 else None  # after requires_grad and backward hooks
    if flags and not (isinstance(flags, dict) and set(flags) <= {"neg", "conj"}):
        raise WeightsError("it has a tensor with unknown properties")
    negative = bool(flags and flags.get("neg"))
    if negative and storage.dtype == np.bool_:
        raise WeightsError("it has a tensor of negative bools")
    return Tensor(storage, offset, tuple(shape), tuple(strides), negative)


def _rebuild_from_type(function: Any, _class: Any, arguments: Any, *_: Any) -> Any:
    """Rebuild a tensor that has attributes of its own, without the attributes."""
    if not isinstance(function, Global) or function.build is not _rebuild_tensor:
        raise WeightsError("it has a tensor that is made in an unknown way")
    return _rebuild_tensor(*arguments)


def _size(numbers: Any = ()) -> tuple[int, ...]:
    if type(numbers) not in (list, tuple) or not all(type(number) is int for number in numbers):
        raise WeightsError("it has a torch.Size of something other than integers")
    return tuple(numbers)


_BUILTINS = (
    "bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "long", "set", "str", "tuple", "unicode",
)  # fmt: skip
_TORCH_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
)  # fmt: skip
_PLACEHOLDERS = (
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
    "builtins.range", "__builtin__.xrange", "datetime.date", *(f"torch.{name}" for name in _TORCH_DTYPES),
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    "pathlib.WindowsPath", "datetime.datetime", "datetime.timedelta", "_codecs.encode", "torch.device",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
"""Classes of objects that training scripts store with their weights. None of them is ever built."""

_FUNCTIONS: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys((*DTYPES, "torch.Tensor", "torch.nn.parameter.Parameter")),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "collections.OrderedDict": ordered_dict,
    "collections.Counter": ordered_dict,
    "collections.defaultdict": lambda _=None: {},
}

ADMITTED: dict[str, Global | Placeholder] = {
    **{name: Global(name, build) for name, build in _FUNCTIONS.items()},
    **{name: Placeholder(name) for name in _PLACEHOLDERS},
}
"""Every name that a pickle may use."""

_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (device 'meta')",
    "torch._utils._rebuild_tensor_v3": "a tensor of a rare dtype",
    "torch.ComplexFloatStorage": "a complex tensor",
    "torch.ComplexDoubleStorage": "a complex tensor",
    "torch.QInt8Storage": "a quantised tensor",
    "torch.QUInt8Storage": "a quantised tensor",
    "torch.QInt32Storage": "a quantised tensor",
}

_HARMLESS_PACKAGES = (
    "torch", "torchvision", "timm", "mmcv", "mmengine", "mmpose", "mmdet", "mmseg", "omegaconf", "__main__", "models",
)  # fmt: skip


def _explain_refusal(name: str) -> str:
    if name in _OTHER_TENSORS:
        return f"it has {_OTHER_TENSORS[name]} ({name}); dense tensors of floating-point, integer and bool dtypes can be read"
    if name.split(".")[0] in _HARMLESS_PACKAGES:
        return (
            f"it asks for {name}: it is a whole pickled model or checkpoint. If you trust it, open it in PyTorch with its "
            "code, and save only the weights: `torch.save(model.state_dict(), 'weights.pth')`"
        )
    return (
        f"it asks for {name}, which no weights need. Nothing was run. PyTorch or pickle may run code when they open it: open it "
        "only if you trust it"
    )


def extract(
    pickled: Pickled, load: Callable[[Storage], np.ndarray], file_size: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the state dict inside a checkpoint's wrappers, and the checkpoint's other items, name to type.

    The wrappers are modified. `load` reads a storage as an array (count,) of its dtype, once per storage. The arrays may not
    have more bytes than the file.
    """
    value, others = pickled.value, {}
    while isinstance(value, dict) and (wrapper := next((key for key in WRAPPERS if isinstance(value.get(key), dict)), None)):
        inner = value.pop(wrapper)  # removed, so that the loop ends for a dict that contains itself
        others |= value
        value = inner
    if not isinstance(value, dict):
        raise WeightsError(f"it holds {_type_name(value)}, not a state dict")
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor) and isinstance(key, str)}
    if not tensors:
        keys = ", ".join(map(_printable, list(value)[:8]))
        raise WeightsError(f"it holds no tensors by name, but {keys or 'nothing'}. Save the state dict alone")
    others |= {key: item for key, item in value.items() if key not in tensors}
    claimed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if claimed > 8 * file_size + 1024:
        raise WeightsError(
            f"its tensors claim {claimed:,} bytes in a file of {file_size:,}; call `.contiguous()` on expanded ones before saving"
        )
    storages = {tensor.storage: load(tensor.storage) for tensor in tensors.values()}
    arrays = {key: _array(tensor, storages[tensor.storage]) for key, tensor in tensors.items()}
    return arrays, {_printable(key): _type_name(item) for key, item in others.items()}


def _printable(key: Any) -> str:
    text = str(key)[:60]
    return text if text.isprintable() else repr(text)


def _array(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, elements.dtype)
    strides = tuple(stride * elements.itemsize for stride in tensor.strides)
    array = as_strided(elements[tensor.offset :], tensor.shape, strides)
    return -array if tensor.negative else array


def _type_name(value: Any) -> str:
    if isinstance(value, (Global, Placeholder)):
        return value.name
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def write_pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle of a state dict with the opcodes that PyTorch writes; storage n has the key str(n)."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP

    def find_global(dotted_name: str) -> bytes:
        module, _, name = dotted_name.rpartition(".")
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    classes = {dtype: name for name, dtype in DTYPES.items()}
    empty = find_global("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO + b"\2", empty, pickle.MARK]
    for number, (name, array) in enumerate(arrays.items()):
        if array.dtype not in classes:
            raise WeightsError(f"{name} has dtype {array.dtype}; PyTorch's files take {', '.join(map(str, classes))}")
        strides = tuple(stride // array.itemsize for stride in array.strides)
        parts += [
            plain(name), find_global("torch._utils._rebuild_tensor_v2"), pickle.MARK,
            pickle.MARK, plain("storage"), find_global(classes[array.dtype]), plain(str(number)), plain("cpu"), plain(array.size),
            pickle.TUPLE, pickle.BINPERSID, plain(0), plain(array.shape), plain(strides), pickle.NEWFALSE, empty,
            pickle.TUPLE, pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])
