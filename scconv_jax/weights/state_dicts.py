"""Reads and writes the pickle of a PyTorch state dict without PyTorch. Tensors are views of storages.

References: https://github.com/pytorch/pytorch/blob/main/torch/_utils.py and
https://github.com/pytorch/pytorch/blob/main/torch/serialization.py.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from scconv_jax.messages import listed
from scconv_jax.weights.files import Contents, WeightsError
from scconv_jax.weights.pickles import Global, Inert, ordered_dict, unpickle
from scconv_jax.weights.selection import select

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

_OTHER_STORAGES: dict[str, tuple[np.dtype, str]] = {  # the dtype gives only their size
    "torch.ComplexFloatStorage": (np.dtype(np.complex64), "a complex tensor"),
    "torch.ComplexDoubleStorage": (np.dtype(np.complex128), "a complex tensor"),
    "torch.QInt8Storage": (np.dtype(np.int8), "a quantised tensor"),
    "torch.QUInt8Storage": (np.dtype(np.uint8), "a quantised tensor"),
    "torch.QInt32Storage": (np.dtype(np.int32), "a quantised tensor"),
    "torch.storage.UntypedStorage": (np.dtype(np.uint8), "a tensor of a rare dtype"),
}
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (device 'meta')",
    "torch._utils._rebuild_tensor_v3": "a tensor of a rare dtype",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of an XLA or HPU device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of another class",
}
"""Functions that make a tensor which cannot be converted, and what it is."""


class Storage(NamedTuple):
    """A one-dimensional array that tensors are views of."""

    key: str
    dtype: np.dtype
    length: int  # elements
    other: str = ""  # the kind of its tensors, if they cannot be converted

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
    """Read the pickle of a state dict or checkpoint."""
    storages: dict[str, Storage] = {}

    def load_persistent(identifier: Any) -> Storage | Inert:
        match identifier:
            case ("module", Inert() as module, *_):  # the class of a pickled module and its source, in the legacy format
                return Inert(module.name)
        storage = _storage(identifier)
        if storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"its storage {storage.key} is described in two ways")
        return storage

    value, end = unpickle(data, start, _find_name, load_persistent)
    return Pickled(value, storages, end)


def _storage(identifier: Any) -> Storage:
    """Return the storage for a persistent identifier: ("storage", class, key, device, number of elements)."""
    match identifier:
        case ("storage", (Global() | Inert()) as named, str(key), _, int(count), *view) if count >= 0:
            kind = named.name
            if view not in ([], [None]):
                raise WeightsError("it has views of storages, which PyTorch before 0.4 wrote; save it again with a later version")
            if kind in _OTHER_STORAGES:
                dtype, tensor = _OTHER_STORAGES[kind]
                return Storage(key, dtype, count, f"{tensor} ({kind})")
            if kind not in DTYPES:
                raise WeightsError(f"it has a storage of {kind}; those that can be read are {', '.join(DTYPES)}")
            return Storage(key, DTYPES[kind], count)
        case _:
            raise WeightsError("it refers to something that is not a storage")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> Tensor | Inert:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers):
        raise WeightsError("it has a tensor with an invalid storage, or an invalid number among its offset, sizes or strides")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES or math.prod(max(size, 1) for size in shape) >= 1 << 50:
        raise WeightsError(f"it has a tensor of sizes {shape} and strides {strides}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.length:
        raise WeightsError(f"it has a tensor that reaches to element {last:,} of a storage of {storage.length:,}")
    if storage.other:
        return Inert(storage.other)
    flags = others[2] if len(others) > 2 else None  # after requires_grad and backward hooks
    if flags and not (isinstance(flags, dict) and set(flags) <= {"neg", "conj"}):
        raise WeightsError("it has a tensor with unknown properties")
    negative = bool(flags and flags.get("neg"))
    if negative and storage.dtype == np.bool_:
        raise WeightsError("it has a tensor of negative bools")
    return Tensor(storage, offset, tuple(shape), tuple(strides), negative)


def _rebuild_from_type(function: Any, _class: Any, arguments: Any, *_: Any) -> Any:
    """Rebuild a tensor that has attributes of its own, without the attributes."""
    if isinstance(function, Inert):
        return Inert(function.name)
    if not isinstance(function, Global) or function.build is not _rebuild_tensor:
        raise WeightsError("it has a tensor that is made in an unknown way")
    return _rebuild_tensor(*arguments)


def _size(numbers: Any = ()) -> tuple[int, ...]:
    if type(numbers) not in (list, tuple) or not all(type(number) is int for number in numbers):
        raise WeightsError("it has a torch.Size of something other than integers")
    return tuple(numbers)


FUNCTIONS: dict[str, Callable[..., Any] | None] = {
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

_ATTACK = re.compile(
    r"(os|posix|nt|subprocess|sys|commands|pty|runpy|socket|shutil|ctypes|importlib|code|_?pickle|cPickle|marshal|webbrowser)\."
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|input|breakpoint)\b"
    r"|.*__(import|globals|builtins|subclasses|code)__"
)
"""Names that no weights need. They would be as inert as any other, but the user should know of the attack."""


def _find_name(name: str) -> Global | Inert:
    """Return what a name in a pickle stands for. An unknown name is inert."""
    if name in FUNCTIONS:
        return Global(name, FUNCTIONS[name])
    if _ATTACK.match(name) or not name.isprintable():
        raise WeightsError(_explain_object(name))
    return Inert(f"{_OTHER_TENSORS[name]} ({name})" if name in _OTHER_TENSORS else name)


_HARMLESS_PACKAGES = (
    "torch", "torchvision", "timm", "mmcv", "mmengine", "mmpose", "mmdet", "mmseg", "omegaconf", "__main__", "models",
)  # fmt: skip


def _explain_object(name: str) -> str:
    """Return the message for a file that is an object, or that asks for the name of an attack."""
    if name.split(".")[0] in _HARMLESS_PACKAGES:
        return (
            f"it asks for {name}: it is a whole pickled model or checkpoint. If you trust it, open it in PyTorch with its "
            "code, and save only the weights: `torch.save(model.state_dict(), 'weights.pth')`"
        )
    return (
        f"it asks for {name}, which no weights need. Nothing was run. PyTorch or pickle may run code when they open it: open it "
        "only if you trust it"
    )


def extract(pickled: Pickled, load: Callable[[Storage], np.ndarray], file_size: int, key: str) -> Contents:
    """Return the state dict in a checkpoint, chosen by `key` or by the rules of `select`, and the names of its other items.

    `load` reads a storage as an array (count,) of its dtype, once per storage. The arrays may not have more bytes than the file.
    """
    value = pickled.value
    if isinstance(value, Inert) and not value and not value.name.startswith("a "):
        raise WeightsError(_explain_object(value.name))
    if not isinstance(value, dict):
        raise WeightsError(f"it holds {_type_name(value)}, not a state dict")
    selected = select(value, key)
    if selected is None:
        items = [f"{_printable(key)} ({_type_name(item)})" for key, item in value.items()]
        raise WeightsError(f"it holds no tensors by name, but {listed(items, 8) or 'nothing'}. Save the state dict alone")
    tensors = {name: item for name, item in selected.entries.items() if isinstance(item, Tensor) and isinstance(name, str)}
    others = selected.skipped | {name: item for name, item in selected.entries.items() if name not in tensors}
    claimed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if claimed > 8 * file_size + 1024:
        raise WeightsError(
            f"its tensors claim {claimed:,} bytes in a file of {file_size:,}; call `.contiguous()` on expanded ones before saving"
        )
    storages = {tensor.storage: load(tensor.storage) for tensor in tensors.values()}
    arrays = {name: _array(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}
    skipped = {_printable(name): _type_name(item) for name, item in others.items()}
    return Contents(arrays, skipped, key=selected.key, others=selected.others)


def _printable(key: Any) -> str:
    text = str(key)[:200]
    return text if text.isprintable() else repr(text)


def _array(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, elements.dtype)
    strides = tuple(stride * elements.itemsize for stride in tensor.strides)
    array = as_strided(elements[tensor.offset :], tensor.shape, strides)
    return -array if tensor.negative else array


def _type_name(value: Any) -> str:
    if isinstance(value, (Global, Inert)):
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
