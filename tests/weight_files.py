"""Files of weights made by hand, byte by byte, so that they can lie. PyTorch is not needed.

A pickle is bytes of opcodes; `zip_file` and `legacy_file` put one into PyTorch's two formats, beside its storages.
"""

import json
import pickle
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from scconv_jax.weights import state_dicts

NAMES = [
    *state_dicts.FUNCTIONS, "argparse.Namespace", "builtins.set", "builtins.getattr", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch.ComplexFloatStorage", "torch.storage.UntypedStorage", "own.Dict",
]  # fmt: skip
"""Names in pickles: those that a state dict needs, and some that stay inert."""

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
VERSION = pickle.dumps(1001, protocol=2)
MACHINE = pickle.dumps(
    {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}, protocol=2
)


def arrays(seed=0, count=3):
    """A small state dict of several dtypes and shapes, with 0 axes and with none at all."""
    numbers = np.random.default_rng(seed)
    result = {f"layer{i}.weight": numbers.standard_normal((4, 3, i + 1, 2)).astype(np.float32) for i in range(count)}
    result["bn.running_mean"] = numbers.standard_normal(4)
    result["bn.num_batches_tracked"] = np.array(7, np.int64)
    result["half"] = numbers.standard_normal(5).astype(np.float16)
    result["empty"] = np.zeros((0, 3), np.float32)
    return result


def text(value):
    """The opcodes of plain data, without PROTO and STOP."""
    return pickle.dumps(value, protocol=2)[2:-1]


def named(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key="0", kind="torch.FloatStorage", count=4):
    return b"(" + text("storage") + named(kind) + text(key) + text("cpu") + text(count) + b"tQ"


def tensor(storage_opcodes=None, offset=0, shape=(2, 2), strides=(2, 1)):
    """The opcodes of one tensor, with whatever is to be wrong about it."""
    inner = storage() if storage_opcodes is None else storage_opcodes
    hooks = named("collections.OrderedDict") + b")R"
    arguments = b"(" + inner + text(offset) + text(shape) + text(strides) + b"\x89" + hooks + b"t"
    return named("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def dictionary(entries):
    """A pickled dict of opcodes by key."""
    return b"}(" + b"".join(text(key) + value for key, value in entries) + b"u"


def whole(opcodes):
    return b"\x80\x02" + opcodes + b"."


def state_dict_file(kind, tensors):
    """An honest file of either format."""
    opcodes = state_dicts.write_pickle(tensors)
    storages = [np.ascontiguousarray(array).tobytes() for array in tensors.values()]
    if kind == "zip":
        return zip_file(opcodes, storages)
    return legacy_file(as_legacy(opcodes), storages, [array.size for array in tensors.values()])


def as_legacy(opcodes):
    """The opcodes of a state dict as the legacy format has them: each storage tells of one more thing, a view, which is None."""
    return opcodes.replace(b"tQ", b"NtQ")


def zip_file(opcodes, storages=(b"\0" * 16,), extra=()):
    entries = [Entry("archive/data.pkl", opcodes), Entry("archive/byteorder", b"little")]
    entries += [Entry(f"archive/data/{i}", data) for i, data in enumerate(storages)]
    return archive([*entries, *extra, Entry("archive/version", b"3\n")])


def legacy_file(opcodes, storages=(b"\0" * 16,), counts=(4,), keys=None, machine=MACHINE):
    keys = pickle.dumps([str(i) for i in range(len(storages))] if keys is None else keys, protocol=2)
    data = b"".join(struct.pack("<q", count) + content for count, content in zip(counts, storages, strict=True))
    return MAGIC + VERSION + machine + opcodes + keys + data


def safetensors_file(header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


@dataclass
class Entry:
    """One entry of a zip archive; what is None is told truly."""

    name: str
    data: bytes
    local_name: str | None = None  # in the entry's own header
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    method: int = 0
    flags: int = 0
    offset: int | None = None


def archive(entries, *, count=None, directory_size=None, directory_at=None):
    body, directory = b"", b""
    for entry in entries:
        name, local_name = entry.name.encode(), (entry.local_name or entry.name).encode()
        size = len(entry.data) if entry.size is None else entry.size
        packed = len(entry.data) if entry.packed is None else entry.packed
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        common = (entry.flags, entry.method, 0, 33, crc, packed, size)
        offset = len(body) if entry.offset is None else entry.offset
        body += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, *common, len(local_name), 0) + local_name + entry.data
        directory += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, *common, len(name), 0, 0, 0, 0, 0, offset) + name
    count = len(entries) if count is None else count
    size = len(directory) if directory_size is None else directory_size
    at = len(body) if directory_at is None else directory_at
    return body + directory + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, at, 0)


def as_zip64(content, place=None):
    """The same archive with the long numbers that one of more than 4 GB has; `place` is where it says that they stand."""
    end, last = content[:-22], content[-22:]
    count, size, at = struct.unpack("<8xHxxII", last[:-2])
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(end) if place is None else place, 1)
    return end + record + locator + last


def call(function, *arguments):
    """The opcodes of a call: `function` is a dotted name or opcodes, as is each argument; other arguments are plain data."""
    opcodes = [named(function) if isinstance(function, str) else function, b"("]
    opcodes += [argument if isinstance(argument, bytes) else text(argument) for argument in arguments]
    return b"".join([*opcodes, b"tR"])


def live_payloads(canary):
    """Opcodes, by name, that make the file `canary` where a pickle is read without care."""
    command = f"echo hurt > {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    system = call("os.system", command)
    return {
        "os.system": system,
        "posix.system": call("posix.system", command),
        "builtins.eval": call("builtins.eval", code),
        "builtins.exec": call("builtins.exec", code),
        "subprocess.call": call("subprocess.call", ["sh", "-c", command]),
        "a called call": call(call("builtins.getattr", call("builtins.__import__", "os"), "system"), command),
        "a call in a call's arguments": call("builtins.list", b"(" + system + b"t"),
        "a call in an admitted call's arguments": call("collections.OrderedDict", b"](" + b"(" + text("k") + system + b"te"),
        "a lazy call": call("builtins.list", call("builtins.map", named("os.system"), [command])),
        "a call in a state": named("argparse.Namespace") + b")\x81}" + text("x") + system + b"sb",
        "a call in a list": b"](" + system + b"e",
        "INST": b"(" + text(command) + b"ios\nsystem\n",
        "OBJ": b"(" + named("os.system") + text(command) + b"o",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + text((command,)) + b"R",
        "a dotted name": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text((command,)) + b"R",
        "a forgotten result": system + b"0N",
    }
