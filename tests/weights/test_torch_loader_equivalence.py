"""Differential test against PyTorch's own loader: what both read has equal bits, and what only PyTorch reads is refused by name.

Files are generated with `torch.save`, whole and damaged, or written by hand. A child process with limits on memory and time runs
`torch.load(weights_only=True)` on all of them: a damaged file may make it crash or never return, and a new child reads the rest.
"""

import hashlib
import json
import os
import random
import re
import select
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from scconv_jax import weights
from scconv_jax.weights.files import WeightsError
from tests import weight_files as made
from tests.weight_files import Entry, archive, as_zip64, dictionary, named, storage, tensor, text, whole

# Reads one path per line from standard input, answers each with a line of JSON.
CHILD = """
import hashlib, json, resource, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if taken:
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)

def state_dicts(path):
    # Those of the checkpoint, and of the dictionaries in it.
    found, level = [], [torch.load(path, map_location="cpu", weights_only=True)]
    for _ in range(5):
        found += map(tensors, level)
        level = [item for value in level for item in value.values() if isinstance(item, dict) and item is not value]
    return found

def tensors(value):
    entries = {}
    for key, tensor in value.items():
        if isinstance(key, str) and isinstance(tensor, torch.Tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensor = tensor.detach().resolve_neg().contiguous()
            tensor = tensor.view(torch.uint8) != 0 if tensor.dtype == torch.bool else tensor  # a file may have any byte for True
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            entries[key] = [dtype, list(tensor.shape), hashlib.sha256(data.data).hexdigest()]
    return entries

print("ready", flush=True)
for line in sys.stdin:
    try:
        answer = state_dicts(json.loads(line))
    except Exception as error:
        answer = type(error).__name__
    print(json.dumps(answer), flush=True)
"""


class TorchLoader:
    """PyTorch's `weights_only` loader in a child process."""

    def __init__(self):
        self.child = None

    def read(self, path, seconds):
        """Return each dictionary's `{key: [dtype, shape, SHA-256]}`, or a string: the error's class, "crashed", "did not end"."""
        if self.child is None:
            command = [sys.executable, "-c", CHILD]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.child = subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, text=True, **streams)
            assert self.child.stdout.readline() == "ready\n"
        self.child.stdin.write(json.dumps(str(path)) + "\n")
        self.child.stdin.flush()
        if not select.select([self.child.stdout], [], [], seconds)[0]:
            self.close()
            return "did not end"
        line = self.child.stdout.readline()
        if not line:
            self.close()
            return "crashed"
        return json.loads(line)

    def close(self):
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


@pytest.fixture(scope="module")
def torch_loader():
    loader = TorchLoader()
    yield loader
    loader.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pth"


def described(tensors):
    return {
        key: [array.dtype.name, list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]
        for key, array in tensors.items()
    }


# What we may refuse although PyTorch reads it, one entry for each reason.
REFUSALS = (
    r"the file is cut off or damaged|is cut off|is damaged",
    r"its pickle (is damaged|ends too early|has protocol|leaves more than one value|appends to|sets items|calls|makes an object)",
    r"its pickle has (an integer of|more than [\d,]+ opcodes)",
    r"its pickle sets the state of",
    r"entry .* occurs twice",
    r"no directory at the stated offset",
    r"its archive has an entry .* outside its folder",
    r"(lies before it or overlaps another|ends beyond the archive|is compressed or encrypted|another name or compression)",
    r"its checksum differs",
    r"not of PyTorch|TorchScript",
    r"it asks for ",
    r"a tensor that is made in an unknown way",
    r"a tensor (that reaches to element|of sizes|with an invalid storage|with unknown properties|of negative bools)",
    r"its tensors claim [\d,]+ bytes in a file of",
    r"its storage .* is described in two ways",
    r"storage .* (is not in its archive|has [\d,]+ bytes, but needs)",
    r"it has a storage of|views of storages|not a storage|a torch\.Size of something",
    r"its list of storages differs",
    r"its byte order is",
    r"big-endian machine",
    r"a key (that cannot be printed|of [\d,]+ characters)",
    r"it holds (no tensors by name|no arrays|several sets of weights|.*, not a state dict)",
    r"version 1001|magic number|an? (unknown format|Python pickle)",
    r"the path .* has an empty part",
)


def compare(path, loader, seconds=30):
    """Read a file with both loaders; return what each did: "read", "refused", "crashed" or "did not end"."""
    theirs = loader.read(path, seconds)
    outcome = theirs if theirs in ("crashed", "did not end") else "refused" if isinstance(theirs, str) else "read"
    try:
        tensors = weights.read(path).tensors
    except WeightsError as error:
        if outcome == "read":
            is_named = any(re.search(reason, str(error)) for reason in REFUSALS)
            assert is_named, f"PyTorch reads it, we do not: {error}"  # noqa: PT017 (its text is looked up in a list)
        return "refused", outcome
    if outcome == "read":
        assert described(tensors) in theirs
    return "read", outcome


# Generated files


WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "any")
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def random_tensor(chance, shared):
    """A tensor of any dtype and layout, perhaps a view of one of the `shared` storages."""
    dtype = getattr(torch, chance.choice(DTYPES))
    if chance.random() < 0.4 and shared:
        base = chance.choice(shared)
    else:
        shape = [chance.randrange(5) for _ in range(chance.randrange(5))]
        base = torch.tensor(np.random.default_rng(chance.randrange(1000)).integers(-9, 9, shape)).to(dtype)
        shared.append(base)
    match chance.randrange(8):
        case 0 if base.ndim > 1:
            return base.transpose(0, chance.randrange(base.ndim))
        case 1 if base.ndim and base.shape[0] > 1:
            return base[1::2]
        case 2 if base.ndim == 4:
            return base.contiguous(memory_format=torch.channels_last)
        case 3 if base.ndim and 1 in base.shape:
            return base.expand([3 if size == 1 else size for size in base.shape])
        case 4 if base.is_floating_point():
            return torch.nn.Parameter(base)
        case 5 if base.dtype == torch.float32:
            return torch.complex(base, base).conj().imag  # a view with the negative bit
        case 6 if base.is_floating_point() and base.numel():
            return base / 0  # NaN and infinity
        case _:
            return base


def random_checkpoint(chance):
    shared = []
    value = {
        f"layer{i}.{chance.choice(['weight', 'bias'])}": random_tensor(chance, shared) for i in range(chance.randrange(1, 6))
    }
    for _ in range(chance.choice([0, 0, 1, 2])):
        value = {chance.choice(WRAPPERS): value, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}, "lr": [0.1, None]}}
    return value


def generate(path, number):
    chance = random.Random(number)
    torch.save(
        random_checkpoint(chance),
        path,
        _use_new_zipfile_serialization=chance.random() < 0.5,
        pickle_protocol=chance.choice([2, 2, 2, 3, 4]),
    )
    return chance


def test_generated_files_are_read_equally(path, torch_loader):
    outcomes = set()
    for number in range(150):
        generate(path, number)
        outcomes.add(compare(path, torch_loader))
    # PyTorch's loader knows pickles of protocol 2 and 3; `torch.save` writes others if it is told to.
    assert outcomes == {("read", "read"), ("read", "refused")}


def damage(content, chance):
    """Change bits, bytes or lengths in a few places, or cut the file."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(data))
        match chance.randrange(6):
            case 0 | 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                data[at] = chance.randrange(256)
            case 3:
                data[at : at + 4] = struct.pack("<I", chance.choice([0, 1, 2**31, 2**32 - 1]))
            case 4:
                del data[at : at + chance.choice([1, 4, 64])]
            case _:
                other = chance.randrange(len(data))
                data[at : at + 8] = data[other : other + 8]
    return bytes(data)


def test_damaged_files_are_read_equally_or_refused(path, torch_loader):
    outcomes = []
    for number in range(400):
        chance = generate(path, 10_000 + number)
        path.write_bytes(damage(path.read_bytes(), chance))
        outcomes.append(compare(path, torch_loader))
    assert outcomes.count(("read", "read")) > 20, "the damage is too great to tell anything"
    assert outcomes.count(("refused", "refused")) > 20


def test_damaged_pickles_in_intact_containers(path, torch_loader):
    """Without the checksums of an archive, which show most damage; two storages may then be confused, and the bits with them."""
    opcodes = whole(
        dictionary(
            [
                ("a", tensor()),
                ("b", tensor(storage("1", count=6), 1, (2, 2), (2, 1))),
                ("c", tensor(storage("2", "torch.HalfStorage", 8), 0, (4, 2), (1, 4))),
            ]
        )
    )
    numbers = [np.arange(count, dtype=dtype) for count, dtype in ((4, np.float32), (6, np.float32), (8, np.float16))]
    storages = [array.tobytes() for array in numbers]
    outcomes = []
    for number in range(400):
        chance = random.Random(number)
        damaged = bytearray(opcodes)
        for _ in range(chance.choice([1, 1, 2])):
            damaged[chance.randrange(len(damaged))] = chance.choice([*range(9), chance.randrange(256)])
        if number % 2:
            path.write_bytes(made.zip_file(bytes(damaged), storages))
        else:
            path.write_bytes(made.legacy_file(made.as_legacy(bytes(damaged)), storages, [array.size for array in numbers]))
        outcomes.append(compare(path, torch_loader))
    assert outcomes.count(("read", "read")) > 20


# Files made to look different to different readers

PICKLE = whole(dictionary([("w", tensor())]))
ONES, TWOS = np.ones(4, np.float32).tobytes(), np.full(4, 2, np.float32).tobytes()


def plain(data=ONES):
    return archive([Entry("archive/data.pkl", PICKLE), Entry("archive/byteorder", b"little"), Entry("archive/data/0", data)])


def two_directories():
    """One archive inside another's body: Python's zipfile takes the last directory, PyTorch the one at the stated offset."""
    return plain(TWOS)[:-22] + plain(ONES)


def two_names(second):
    entries = [Entry("archive/data.pkl", PICKLE), Entry("archive/byteorder", b"little"), Entry("archive/data/0", ONES)]
    return archive([*entries, Entry(second, TWOS)])


def negative(kind):
    opcodes = tensor(storage(kind=f"torch.{kind}Storage"))[:-2] + text({"neg": True}) + b"tR"
    return made.zip_file(whole(dictionary([("w", opcodes)])))


MADE_TO_DIFFER = {
    "two directories": two_directories(),
    "two directories, the first stated": two_directories()[:-6] + plain(TWOS)[-6:],
    "something before the archive": b"PK" + bytes(62) + plain(),
    "a comment that ends like an archive": plain()[:-2] + b"\x16\0" + plain(TWOS)[-22:],
    "zip64": as_zip64(plain()),
    "zip64 locator to another place": as_zip64(plain(), place=7),
    "zip64 record and another offset": as_zip64(plain())[:-6] + struct.pack("<I", 7) + b"\0\0",
    "zip64 locator to an earlier archive": as_zip64(plain(TWOS)) + as_zip64(plain(), place=len(plain(TWOS)) - 22),
    "keys of storages that differ in case": two_names("archive/DATA/0"),
    "a second data.pkl in capitals": two_names("archive/DATA.PKL"),
    "a name twice": two_names("archive/data/0"),
    "another folder": two_names("other/data/0"),
    "another name in the local header": archive(
        [Entry("archive/data.pkl", PICKLE), Entry("archive/data/0", ONES, local_name="archive/data/1")]
    ),
    "a wrong checksum": archive([Entry("archive/data.pkl", PICKLE), Entry("archive/data/0", ONES, crc=7)]),
    "negative float": negative("Float"),
    "negative int": negative("Int"),
    "negative unsigned": made.zip_file(
        whole(dictionary([("w", tensor(storage(kind="torch.ByteStorage"))[:-2] + text({"neg": True}) + b"tR")])),
        [bytes([0, 1, 2, 255])],
    ),
    "negative bool": negative("Bool"),
    "bools of other bytes": made.zip_file(
        whole(dictionary([("w", tensor(storage(kind="torch.BoolStorage")))])), [bytes([0, 1, 2, 255])]
    ),
    "a storage in two dtypes": made.zip_file(
        whole(dictionary([("a", tensor()), ("b", tensor(storage(kind="torch.IntStorage")))]))
    ),
    "a key twice": made.zip_file(whole(dictionary([("w", tensor()), ("w", tensor(storage("1")))])), [ONES, TWOS]),
    "a longer storage than stated": made.zip_file(PICKLE, [ONES + TWOS]),
    "a legacy storage of another length": made.legacy_file(PICKLE, [ONES + TWOS], [8]),
    "big-endian": archive(
        [Entry("archive/data.pkl", PICKLE), Entry("archive/byteorder", b"big"), Entry("archive/data/0", ONES)]
    ),
    "a set that takes for ever to hash": made.zip_file(
        whole(
            dictionary(
                [
                    ("w", tensor()),
                    (
                        "s",
                        named("builtins.set")
                        + b"(]("
                        + b")"
                        + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
                        + b"etR",
                    ),
                ]
            )
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_TO_DIFFER)
def test_files_made_to_look_different_are_read_equally_or_refused(path, torch_loader, name):
    path.write_bytes(MADE_TO_DIFFER[name])
    compare(path, torch_loader, seconds=2 if name == "a set that takes for ever to hash" else 30)


def test_a_compressed_archive_is_refused(path, torch_loader):
    """PyTorch unpacks it, however large it becomes."""
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    assert compare(path, torch_loader)[0] == "refused"


def test_the_comparison_sees_a_difference(path, torch_loader, monkeypatch):
    """Otherwise the tests above would prove nothing."""
    torch.save({"w": torch.tensor([1.0, 2.0])}, path)
    source = weights.read(path)
    for other in ([1, 3], [1, -2], [[1, 2]], [1, 2, 3]):
        changed = source._replace(tensors={"w": np.array(other, np.float32)})
        monkeypatch.setattr(weights, "read", lambda _, changed=changed: changed)
        with pytest.raises(AssertionError):
            compare(path, torch_loader)
