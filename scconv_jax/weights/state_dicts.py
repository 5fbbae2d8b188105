"""What the pickle of a PyTorch state dict means: tensors as views of storages, and the names that it may use for them.

PyTorch is not needed, to read or to write; after
https://github.com/pytorch/pytorch/blob/main/torch/_utils.py and https://github.com/pytorch/pytorch/blob/main/torch/serialization.py.
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
from scconv_jax.weights.pickles import Inert, Name, ordered_dict, unpickle

_MOST_AXES = 32

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
"""Keys under which training scripts keep the state dict, the first that is there."""


class Contents(NamedTuple):
    """The state dict of a file, and what stood beside it."""

    tensors: dict[str, np.ndarray]
    skipped: dict[str, str]  # name to kind
    wrappers: tuple[str, ...]  # keys that the state dict stood under, from the outside


class Storage(NamedTuple):
    """Elements in a row, which tensors are views of."""

    key: str
    dtype: np.dtype
    length: int  # elements

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.length * self.dtype.itemsize


class Tensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int  # elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool  # the values are those of the storage with the other sign


class Pickled(NamedTuple):
    """A value as its pickle has it, with `Tensor` for tensors, and the storages that they are views of, by key."""

    value: Any
    storages: dict[str, Storage]
    end: int


def read_pickle(data: bytes, start: int = 0) -> Pickled:
    """Read the pickle of a state dict or checkpoint.

    Raises:
        WeightsError: it is damaged, or names anything but tensors and the harmless classes known here.
    """
    storages: dict[str, Storage] = {}

    def record(identifier: Any) -> Storage:
        storage = _storage(identifier)
        if storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"its storage {storage.key} is described in two ways")
        return storage

    value, end = unpickle(data, NAMES, record, start, _refusal)
    return Pickled(value, storages, end)


def _storage(identifier: Any) -> Storage:
    """The storage that a persistent identifier of the pickle names: ("storage", class, key, device, count of elements)."""
    match identifier:
        case ("storage", Name(text=kind), str(key), _, int(count), *view) if count >= 0:
            if view not in ([], [None]):
                raise WeightsError("it has views of storages, as PyTorch before 0.4 wrote them; save it again with a later one")
            if kind not in DTYPES:
                raise WeightsError(f"it has a storage of {kind}; there are {', '.join(DTYPES)}")
            return Storage(key, DTYPES[kind], count)
        case _:
            raise WeightsError("it refers to something that is no storage")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers):
        raise WeightsError("it has a tensor whose offset, sizes or strides are no such numbers")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES or math.prod(max(size, 1) for size in shape) >= 1 << 50:
        raise WeightsError(f"it has a tensor of sizes {shape} and strides {strides}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.length:
        raise WeightsError(f"it has a tensor that reaches to element {last:,} of a storage of {storage.length:,}")
    flags = others[2] if len(others) > 2 else None  # after whether it has a gradient, and its hooks
    if flags and not (isinstance(flags, dict) and set(flags) <= {"neg", "conj"}):
        raise WeightsError("it has a tensor with unknown properties")
    negative = bool(flags and flags.get("neg"))
    if negative and storage.dtype == np.bool_:
        raise WeightsError("it has a tensor of negative bools")
    return Tensor(storage, offset, tuple(shape), tuple(strides), negative)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_class(function: Any, _class: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes of its own, which are left out."""
    if not isinstance(function, Name) or function.build is not _tensor:
        raise WeightsError("it has a tensor that is made in an unknown way")
    return _tensor(*arguments)


def _size(numbers: Any = ()) -> tuple[int, ...]:
    if type(numbers) not in (list, tuple) or not all(type(number) is int for number in numbers):
        raise WeightsError("it has a torch.Size of something other than numbers")
    return tuple(numbers)


def _named(functions: Mapping[str, Callable[..., Any] | None]) -> dict[str, Name | Inert]:
    return {text: Name(text, function) for text, function in functions.items()}


_BUILTINS = (
    "bool",
    "bytearray",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "long",
    "set",
    "str",
    "tuple",
    "unicode",
)
_TORCH_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
)  # fmt: skip
_INERT = (
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
    "builtins.range", "__builtin__.xrange", "datetime.date", *(f"torch.{name}" for name in _TORCH_DTYPES),
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    "pathlib.WindowsPath", "datetime.datetime", "datetime.timedelta", "_codecs.encode", "torch.device",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
"""Classes of what training scripts keep beside their weights. Nothing is made of them."""

NAMES: dict[str, Name | Inert] = {
    **_named(dict.fromkeys((*DTYPES, "torch.Tensor", "torch.nn.parameter.Parameter"))),
    **_named(
        {
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._tensor._rebuild_from_type_v2": _of_class,
            "torch.Size": _size,
            "collections.OrderedDict": ordered_dict,
            "collections.Counter": ordered_dict,
            "collections.defaultdict": lambda _=None: {},
        }
    ),
    **{text: Inert(text) for text in _INERT},
}
"""All that a pickle may name."""

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

_HARMLESS_ROOTS = (
    "torch",
    "torchvision",
    "timm",
    "mmcv",
    "mmengine",
    "mmpose",
    "mmdet",
    "mmseg",
    "omegaconf",
    "__main__",
    "models",
)


def _refusal(name: str) -> str:
    if name in _OTHER_TENSORS:
        return f"it has {_OTHER_TENSORS[name]} ({name}); dense ones of floating point, integer and bool dtypes can be read"
    if name.split(".")[0] in _HARMLESS_ROOTS:
        return (
            f"it asks for {name}: it is a whole pickled model or checkpoint. If you trust it, open it in PyTorch beside its "
            "code, and save the weights alone: `torch.save(model.state_dict(), 'weights.pth')`"
        )
    return (
        f"it asks for {name}, which no weights need. Nothing was run. Opened by PyTorch or pickle, it may run code: do so only "
        "if you trust it"
    )


def contents(pickled: Pickled, load: Callable[[Storage], np.ndarray], file_size: int) -> Contents:
    """Make the arrays of the state dict that a pickle has, perhaps in a wrapper.

    Args:
        pickled: what `read_pickle` returned; wrappers are taken apart.
        load: reads a storage, as an array (count,) of its dtype; called once for each that is needed.
        file_size: bytes of the file, which bounds those of the arrays.

    Raises:
        WeightsError: there are no tensors by name, or they claim far more than the file has.
    """
    value, beside, wrappers = pickled.value, {}, []
    while isinstance(value, dict) and (wrapper := next((key for key in WRAPPERS if isinstance(value.get(key), dict)), None)):
        inner = value.pop(wrapper)  # so that a dict within itself comes to an end
        beside |= value
        wrappers.append(wrapper)
        value = inner
    if not isinstance(value, dict):
        raise WeightsError(f"it holds {_kind(value)}, not a state dict")
    tensors = {key: item for key, item in value.items() if isinstance(item, Tensor) and isinstance(key, str)}
    if not tensors:
        keys = ", ".join(map(_shown, list(value)[:8]))
        raise WeightsError(f"it holds no tensors by name, but {keys or 'nothing'}. Save the state dict alone")
    beside |= {key: item for key, item in value.items() if key not in tensors}
    claimed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if claimed > 8 * file_size + 1024:
        raise WeightsError(
            f"its tensors say that they have {claimed:,} bytes, in a file of {file_size:,}; save expanded ones by `.contiguous()`"
        )
    storages = {tensor.storage: load(tensor.storage) for tensor in tensors.values()}
    return Contents(
        {name: _array(tensor, storages[tensor.storage]) for name, tensor in tensors.items()},
        {_shown(key): _kind(item) for key, item in beside.items()},
        tuple(wrappers),
    )


def _shown(key: Any) -> str:
    """A key of a dict, fit to be printed."""
    text = str(key)[:60]
    return text if text.isprintable() else repr(text)


def _array(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, elements.dtype)
    strides = tuple(stride * elements.itemsize for stride in tensor.strides)
    array = as_strided(elements[tensor.offset :], tensor.shape, strides)
    return -array if tensor.negative else array


def _kind(value: Any) -> str:
    if isinstance(value, (Name, Inert)):
        return value[0]
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def write_pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of a state dict, opcode by opcode as PyTorch has it; the storage of the n-th array has the key str(n).

    Raises:
        WeightsError: an array of a dtype that is not in `DTYPES`.
    """

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]  # without the protocol before and STOP after it

    def named(text: str) -> bytes:
        module, _, name = text.rpartition(".")
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    classes = {dtype: text for text, dtype in DTYPES.items()}
    empty = named("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO + b"\2", empty, pickle.MARK]
    for number, (name, array) in enumerate(arrays.items()):
        if array.dtype not in classes:
            raise WeightsError(f"{name} is of dtype {array.dtype}; PyTorch's files take {', '.join(map(str, classes))}")
        strides = tuple(stride // array.itemsize for stride in array.strides)
        parts += [
            plain(name), named("torch._utils._rebuild_tensor_v2"), pickle.MARK,
            pickle.MARK, plain("storage"), named(classes[array.dtype]), plain(str(number)), plain("cpu"), plain(array.size),
            pickle.TUPLE, pickle.BINPERSID, plain(0), plain(array.shape), plain(strides), pickle.NEWFALSE, empty,
            pickle.TUPLE, pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])
