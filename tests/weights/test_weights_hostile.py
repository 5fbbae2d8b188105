"""Hostile and false files of weights: none may run code, hang, use much memory, or leave anything behind."""

import pickle
import pickletools
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scconv_jax import weights
from scconv_jax.weights import pickles
from scconv_jax.weights.files import WeightsError
from tests import weight_files as made
from tests.weight_files import Entry, archive, call, dictionary, named, storage, tensor, text, whole

SECONDS = 5
MEGABYTES = 40

FORMATS = {"zip": made.zip_file, "legacy": made.legacy_file}
PLACES = {
    "alone": lambda payload: whole(payload),
    "an entry": lambda payload: whole(dictionary([("conv1.weight", tensor()), ("x", payload)])),
    "behind state_dict": lambda payload: whole(dictionary([("epoch", text(3)), ("state_dict", payload)])),
    "in a state_dict": lambda payload: whole(dictionary([("state_dict", dictionary([("conv1.weight", payload)]))])),
    "beside a state_dict": lambda payload: whole(dictionary([("x", payload), ("state_dict", dictionary([("w", tensor())]))])),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def refused(path, content, match=None):
    """Assert that a file is refused with one clean line, soon, and that only the file is left in its folder."""
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(WeightsError, match=match) as error:
        weights.read(path)
    assert time.monotonic() - start < SECONDS
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == content


def outcome(path, content):
    """Read a file that may be good or bad; return "read" or "refused"."""
    path.write_bytes(content)
    try:
        source = weights.read(path)
    except WeightsError:
        return "refused"
    assert source.tensors
    return "read"


# Code


LIVE = list(made.live_payloads("canary"))


@pytest.mark.parametrize("name", LIVE)
def test_the_payloads_are_live(tmp_path, name):
    """Each does its harm when Python's own unpickler reads it; otherwise the tests below would prove nothing."""
    canary = tmp_path / "canary"
    pickle.loads(whole(made.live_payloads(canary)[name]))
    assert canary.exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", LIVE)
def test_nothing_is_run(path, name, form, place):
    canary = path.parent / "canary"
    payload = made.live_payloads(canary)[name]
    refused(path, FORMATS[form](PLACES[place](payload)))
    assert not canary.exists()


@pytest.mark.parametrize("where", ["machine", "keys", "magic"])
def test_nothing_is_run_in_the_smaller_pickles_of_the_legacy_format(path, where):
    canary = path.parent / "canary"
    payload = whole(made.live_payloads(canary)["os.system"])
    honest = whole(dictionary([("w", tensor())]))
    files = {
        "machine": made.MAGIC + made.VERSION + payload + honest,
        "keys": made.MAGIC + made.VERSION + made.MACHINE + honest + payload,
        "magic": payload + honest,
    }
    refused(path, files[where])
    assert not canary.exists()


DEEP = b"]" * 20_000 + b"a" * 19_999
OTHER_VALUES = {
    "deep": DEEP, "None": b"N", "0": text(0), "{}": text({}), "[0]": text([0]), "one twice": text(["0", "0"]),
    "[['0']]": text([["0"]]), "an unknown key": text(["x"]), "a deep key": b"](" + DEEP + b"e",
}  # fmt: skip


@pytest.mark.parametrize("where", ["magic", "version", "machine", "little_endian", "keys"])
@pytest.mark.parametrize("value", OTHER_VALUES)
def test_other_values_in_the_smaller_pickles_of_the_legacy_format(path, value, where):
    opcodes = OTHER_VALUES[value]
    parts = {
        "magic": made.MAGIC, "version": made.VERSION, "machine": made.MACHINE, "dict": whole(dictionary([("w", tensor())])),
        "keys": whole(text(["0"])), "data": struct.pack("<q", 4) + bytes(16),
    }  # fmt: skip
    path.write_bytes(b"".join(parts.values()))
    assert list(weights.read(path).tensors) == ["w"]
    if where == "little_endian":
        parts["machine"] = whole(dictionary([("little_endian", opcodes)]))
    elif where == "magic":
        parts["magic"] = whole(text(0x1950A86A20F9469CFC6C) + b"0" + opcodes)
    else:
        parts[where] = whole(opcodes)
    refused(path, b"".join(parts.values()))


@pytest.mark.parametrize("key", ["\x1b[2J", "a\nb", "\r", "\u202e"])
def test_keys_with_control_characters(path, key):
    refused(path, made.zip_file(whole(dictionary([(key, tensor())]))), "a key that cannot be printed")
    refused(path, made.safetensors_file({key: FLOATS}, bytes(8)), "a key that cannot be printed")
    path.write_bytes(made.zip_file(whole(dictionary([("w", tensor()), (key, text(1))]))))
    assert all(name.isprintable() for name in weights.read(path).skipped)


@pytest.mark.parametrize(
    "module", ["os", "nt", "sys", "builtins", "__builtin__", "numpy", "torch", "torch.hub", "__main__", "models.resnet"]
)
def test_the_error_quotes_the_name_that_a_file_asks_for(path, module):
    refused(path, made.zip_file(whole(call(f"{module}.load", "x"))), rf"it asks for {module}\.load")


TRICKS = {
    "a state for a function": named("torch._utils._rebuild_tensor_v2") + dictionary([("__code__", text("x"))]) + b"b",
    "a state for a class": named("torch.FloatStorage") + dictionary([("__reduce__", text("x"))]) + b"b",
    "a state for a tensor": tensor() + dictionary([("data", text("x"))]) + b"b",
    "a state for a list": b"]" + dictionary([("x", text(1))]) + b"b",
    "a storage called": call("torch.FloatStorage", 4),
    "an object of a function": named("torch._utils._rebuild_tensor_v2") + b")\x81",
    "a text called": text("os.system") + text(("true",)) + b"R",
    "a number called": text(3) + text(()) + b"R",
    "a function as a tensor's maker": call(
        "torch._tensor._rebuild_from_type_v2", named("collections.OrderedDict"), named("torch.Tensor"), (), {}
    ),
    "arguments that are no tuple": named("torch._utils._rebuild_tensor_v2") + text("abcd") + b"R",
    "too few arguments": call("torch._utils._rebuild_tensor_v2", 1),
    "a dict of no pairs": call("collections.OrderedDict", [["a"]]),
    "a dict of a text": call("collections.OrderedDict", "abc"),
    "a dict of triples": call("collections.Counter", [[1, 2, 3]]),
    "a dict of a number": call("collections.OrderedDict", 3),
    "a size of a number": call("torch.Size", 3),
    "a size of a tensor": call("torch.Size", tensor()),
    "a size of texts": call("torch.Size", ["1"]),
    "a dict of a tensor": call("collections.OrderedDict", tensor()),
    "a state that is no dict": call("collections.OrderedDict") + text([1]) + b"b",
    "items of a dict as of a set": b"}(K\x01\x90",
    "a tensor with unknown properties": tensor()[:-2] + b"}" + text("quantised") + b"\x88s" + b"tR",
    "negative bools": tensor(storage(kind="torch.BoolStorage"))[:-2] + text({"neg": True}) + b"tR",
    "a parameter of nothing": call("torch._utils._rebuild_parameter"),
    "items of a text": text("x") + text("k") + text("v") + b"s",
    "items of a function": named("torch._utils._rebuild_tensor_v2") + text("k") + text("v") + b"s",
    "an appended text": text("x") + text("y") + b"a",
    "a name with a newline in it": text("os\nsystem") + text("x") + b"\x93",
    "a name of numbers": text(1) + text(2) + b"\x93",
    "a dunder of an admitted name": text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
    "an extension": b"\x82\x01",
    "protocol 0": b"(dp0\nS'a'\np1\nI1\ns",
    "a buffer": b"\x97",
    "a persistent identifier that is no storage": text(("module", "os", "system", "x")) + b"Q",
    "a persistent identifier in text": b"P0\n",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", TRICKS)
def test_tricks(path, name, form):
    refused(path, FORMATS[form](whole(TRICKS[name])))
    refused(path, FORMATS[form](whole(dictionary([("state_dict", dictionary([("w", tensor()), ("x", TRICKS[name])]))]))))


@pytest.mark.parametrize("rest", [text(1), b"(", b"(" + text("x")], ids=["a number", "a mark", "a text below a mark"])
def test_a_pickle_that_makes_more_than_it_holds(path, rest):
    honest = dictionary([("w", tensor())])
    for form in FORMATS.values():
        refused(path, form(whole(rest + honest)), "leaves more than one value")
    start = made.MAGIC + made.VERSION
    machine, keys = made.MACHINE[2:-1], text(["0"])
    refused(path, start + whole(rest + machine) + whole(honest), "leaves more than one value")
    refused(path, start + made.MACHINE + whole(honest) + whole(rest + keys), "leaves more than one value")


# Bombs


def laughs():
    """A list of ten lists of ten lists...: small as it is, and without end for who walks it."""
    opcodes = [b"]", b"q\0"]
    for level in range(1, 40):
        opcodes += [b"](", b"h" + bytes([level - 1]), (b"h" + bytes([level - 1])) * 9, b"e", b"q" + bytes([level])]
    return b"".join(opcodes)


PAIRS = b"](" + b"".join(text(f"{i:05}") + b"N\x86" for i in range(20_000)) + b"e"


def again(function, argument, as_tuple):
    """Few opcodes, each of which walks through everything that the opcodes before it made."""
    return argument + b"q\0" + named(function) + b"q\1" + (b"h\1h\0" + as_tuple + b"R0") * 12_000 + b"N"


BOMBS = {
    "lists of lists": lambda: laughs(),
    "texts doubled": lambda: text("x" * 1000) + b"q\0" + b"h\0\x86q\0" * 60,
    "deep tuples": lambda: b")" + b"\x85" * 90_000,
    "deep lists": lambda: b"]" * 45_000 + b"a" * 44_999,
    "deep dicts": lambda: (b"}" + text("state_dict")) * 20_000 + b"}" + b"s" * 20_000,
    "deep objects of an unknown class": lambda: named("own.Dict") + b"q\0" + b")RX\1\0\0\0xh\0" * 15_000 + b")R" + b"s" * 15_000,
    "many objects of an unknown class": lambda: named("own.Dict") + b"q\0" + b"h\0)R0" * 25_000 + b"N",
    "objects in place of keys": lambda: named("own.Dict") + b"q\0}(" + b"h\0)RN" * 25_000 + b"u",
    "a dict in itself": lambda: b"}q\0" + text("state_dict") + b"h\0s",
    "a deep tuple as a key": lambda: b"}" + b")" + b"\x85" * 90_000 + b"Ns",
    "many marks": lambda: b"(" * 90_000,
    "many opcodes": lambda: b"N0" * 600_000,
    "many empty dicts": lambda: b"}" * 1_200_000,
    "many memos": lambda: b"N" + b"\x94" * 1_200_000,
    "equal hashes": lambda: (
        b"}(" + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(40_000)) + b"u"
    ),
    "one list made a dict again and again": lambda: again("collections.OrderedDict", PAIRS, b"\x85"),
    "one list made a size again and again": lambda: again("torch.Size", PAIRS, b"\x85"),
    "one long call again and again": lambda: again("torch._utils._rebuild_parameter", b"(" + b"N" * 30_000 + b"t", b""),
    "a huge text": lambda: b"X\xff\xff\xff\x7f" + b"x" * 100,
    "a huger text": lambda: b"\x8d" + struct.pack("<Q", 2**63) + b"x",
    "a negative text": lambda: b"T" + struct.pack("<i", -5) + b"x",
    "a huge integer": lambda: b"\x8b" + struct.pack("<I", 2**31) + b"x" * 100,
    "a long integer": lambda: b"\x8b" + struct.pack("<I", 10**6) + b"x" * 10**6,
    "a huge frame": lambda: b"\x95" + struct.pack("<Q", 2**62),
    "a line without end": lambda: b"c" + b"x" * 1_000_000,
    "a memo that was never filled": lambda: b"h\7",
    "nothing to pop": lambda: b"000",
    "no mark": lambda: b"NNt",
    "text that is no UTF-8": lambda: b"X\2\0\0\0\xff\xfe",
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(path, name, form, monkeypatch):
    """With a tenth of the permitted opcodes; benchmarks/fuzz_weights.py uses all of them."""
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100_000)
    refused(path, FORMATS[form](b"\x80\x02" + BOMBS[name]() + b"."))
    refused(path, FORMATS[form](b"\x80\x02" + BOMBS[name]()))  # without an end


@pytest.mark.parametrize("name", ["a huge text", "a huger text", "a huge integer", "a huge frame"])
def test_declared_lengths_take_no_memory(path, name):
    path.write_bytes(made.legacy_file(b"\x80\x02" + BOMBS[name]() + b"."))
    tracemalloc.start()
    with pytest.raises(WeightsError):
        weights.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEGABYTES << 20


# Tensors that lie


LIES = {
    "a negative offset": (tensor(offset=-1), "offset"),
    "an offset beyond": (tensor(offset=1), "reaches to element 4 of a storage of 4"),
    "a negative size": (tensor(shape=(-1, 2)), "invalid number among its offset, sizes or strides"),
    "a negative stride": (tensor(strides=(-2, 1)), "invalid number among its offset, sizes or strides"),
    "a size beyond": (tensor(shape=(3, 2)), "reaches to element 5"),
    "a stride beyond": (tensor(strides=(10**6, 1)), "reaches to element 1,000,001"),
    "huge sizes": (tensor(shape=(2**62, 2**62), strides=(0, 0)), "invalid number among its offset, sizes or strides"),
    "large sizes": (tensor(shape=(2**39, 2**39), strides=(0, 0)), "sizes"),
    "huge and empty": (tensor(shape=(0, 2**39, 2**39), strides=(1, 1, 1)), "sizes"),
    "one element many times": (tensor(shape=(10**9,), strides=(0,)), r"claim 4,000,000,000 bytes in a file of"),
    "other numbers of axes": (tensor(shape=(2, 2), strides=(1,)), "sizes"),
    "a hundred axes": (tensor(shape=(1,) * 100, strides=(1,) * 100), "sizes"),
    "sizes of text": (tensor(shape="22", strides=(2, 1)), "invalid number among its offset, sizes or strides"),
    "sizes of floats": (tensor(shape=(2.0, 2.0)), "invalid number among its offset, sizes or strides"),
    "sizes of bools": (tensor(shape=(True, True)), "invalid number among its offset, sizes or strides"),
    "no sizes": (tensor(shape=None), "damaged"),
    "an offset of text": (tensor(offset="0"), "invalid number among its offset, sizes or strides"),
    "no storage": (tensor(text("x")), "invalid number among its offset, sizes or strides"),
    "a storage of many": (tensor(storage(count=5)), "storage 0"),
    "a storage of 2**62": (tensor(storage(count=2**62)), "storage 0"),
    "a storage of less than nothing": (tensor(storage(count=-4)), "not a storage"),
    "an unknown storage": (tensor(storage(key="7")), "storage"),
    "a storage outside": (tensor(storage(key="../../../etc/passwd")), "storage"),
    "a storage of no class": (tensor(b"(" + text(("storage", "torch.FloatStorage", "0", "cpu", 4))[1:-1] + b"Q"), None),
    "a complex storage": (tensor(storage(kind="torch.ComplexFloatStorage")), r"has 16 bytes, but needs 32|is cut off"),
    "a quantised storage": (tensor(storage(kind="torch.QInt8Storage")), r"quantised tensor \(torch\.QInt8Storage\)"),
    "a storage of Tensor": (tensor(storage(kind="torch.Tensor")), r"a storage of torch\.Tensor"),
    "a quantised tensor": (call("torch._utils._rebuild_qtensor", storage()), r"quantised tensor"),
    "a sparse tensor": (call("torch._utils._rebuild_sparse_tensor", storage()), r"sparse tensor"),
    "a tensor without values": (call("torch._utils._rebuild_meta_tensor_no_storage", storage()), "without values"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", LIES)
def test_tensors_that_lie(path, name, form):
    opcodes, match = LIES[name]
    refused(path, FORMATS[form](whole(dictionary([("w", opcodes)]))), match)


@pytest.mark.parametrize("form", FORMATS)
def test_one_storage_under_many_names_is_no_way_to_fill_the_memory(path, form):
    """Each of 1,000 tensors may have the one storage of 10 MB: 10 GB of arrays, once they are copied."""
    entries = [(f"w{i}", tensor(storage(count=2_500_000), shape=(2_500_000,), strides=(1,))) for i in range(1_000)]
    opcodes = whole(dictionary(entries))
    content = bytes(10_000_000)
    file = made.zip_file(opcodes, [content]) if form == "zip" else made.legacy_file(opcodes, [content], [2_500_000])
    refused(path, file, "claim 10,000,000,000 bytes")


@pytest.mark.parametrize("form", FORMATS)
def test_a_storage_described_in_two_ways(path, form):
    entries = [("a", tensor()), ("b", tensor(storage(kind="torch.IntStorage")))]
    refused(path, FORMATS[form](whole(dictionary(entries))), "storage 0 is described in two ways")


@pytest.mark.parametrize("form", FORMATS)
def test_duplicate_entries(path, form):
    entries = [("conv1.weight", tensor()), ("conv1.weight", tensor())]
    refused(path, FORMATS[form](whole(dictionary(entries))), r"entry conv1\.weight occurs twice")


# Archives that lie


HONEST = [Entry("archive/data.pkl", whole(dictionary([("w", tensor())]))), Entry("archive/data/0", bytes(16))]


def deflated(name, data):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(data) + packer.flush()
    return Entry(name, packed, size=len(data), crc=zlib.crc32(data), method=8)


def _with_offset(content, number):
    """An archive with another directory offset in its last record."""
    return content[:-6] + struct.pack("<I", number) + content[-2:]


ARCHIVES = {
    "up and out": (lambda: archive([*HONEST, Entry("archive/../../x", b"")]), "outside its folder"),
    "from the root": (lambda: archive([*HONEST, Entry("/etc/passwd", b"")]), "outside its folder"),
    "backslashes": (lambda: archive([*HONEST, Entry("archive/..\\..\\x", b"")]), "outside its folder"),
    "another folder": (lambda: archive([*HONEST, Entry("other/data/0", b"")]), "outside its folder"),
    "an empty name": (lambda: archive([*HONEST, Entry("", b"")]), "outside its folder"),
    "a folder": (lambda: archive([Entry("archive/", b""), *HONEST, Entry("archive/x/", b"")]), None),
    "a folder elsewhere": (lambda: archive([*HONEST, Entry("x/", b"")]), "outside its folder"),
    "a folder with something in it": (lambda: archive([*HONEST, Entry("archive/x/", b"1")]), "outside its folder"),
    "a name with a zero": (lambda: archive([*HONEST, Entry("archive/x\0y", b"")]), "outside its folder"),
    "a zip bomb for a pickle": (lambda: archive([deflated("archive/data.pkl", bytes(5 * 10**7)), HONEST[1]]), "compressed"),
    "a zip bomb for a storage": (lambda: archive([HONEST[0], deflated("archive/data/0", bytes(5 * 10**7))]), "compressed"),
    "a compressed entry": (lambda: archive([HONEST[0], deflated("archive/data/0", bytes(16))]), "compressed"),
    "an encrypted entry": (lambda: archive([HONEST[0], Entry("archive/data/0", bytes(16), flags=1)]), "encrypted"),
    "one entry over another": (lambda: archive([*HONEST, Entry("archive/x", b"", offset=0)]), "overlaps another"),
    "one inside another": (lambda: archive([*HONEST, Entry("archive/x", b"", offset=20)]), "overlaps another|damaged"),
    "a size beyond the end": (
        lambda: archive([HONEST[0], Entry("archive/data/0", bytes(16), size=10**9, packed=10**9)]),
        "beyond",
    ),
    "sizes that differ": (lambda: archive([HONEST[0], Entry("archive/data/0", bytes(16), size=10**9)]), "compressed"),
    "an offset beyond the end": (lambda: archive([*HONEST, Entry("archive/x", b"", offset=10**9)]), "damaged|cut off"),
    "another name inside": (
        lambda: archive([HONEST[0], Entry("archive/data/0", bytes(16), local_name="archive/data/1")]),
        "another name or compression in its own header",
    ),
    "a name twice": (lambda: archive([*HONEST, HONEST[1]]), r"archive/data/0 occurs twice"),
    "two pickles": (lambda: archive([*HONEST, HONEST[0]]), r"archive/data\.pkl occurs twice"),
    "a wrong checksum": (lambda: archive([HONEST[0], Entry("archive/data/0", bytes(16), crc=7)]), "checksum"),
    "a wrong checksum of the pickle": (lambda: archive([Entry(HONEST[0].name, HONEST[0].data, crc=7), HONEST[1]]), "checksum"),
    "a huge directory": (lambda: archive(HONEST, directory_size=2**31), "directory|damaged"),
    "a directory beyond the end": (lambda: archive(HONEST, directory_at=2**31), "no directory at the stated offset"),
    "a storage cut short": (lambda: archive([HONEST[0], Entry("archive/data/0", bytes(15))]), "15 bytes, but needs 16"),
    "no storage": (lambda: archive([HONEST[0]]), "storage 0 is not in its archive"),
    "no pickle": (lambda: archive([HONEST[1]]), "not of PyTorch"),
    "nothing": (lambda: archive([]), "archive"),
    "an unknown order of bytes": (lambda: archive([*HONEST, Entry("archive/byteorder", b"middle")]), "byte order"),
    "a pickle of 20 MB": (lambda: archive([Entry("archive/data.pkl", bytes(2 * 10**7)), HONEST[1]]), r"20,000,000 bytes"),
    "two archives": (lambda: archive(HONEST)[:-22] + archive(HONEST), "no directory at the stated offset"),
    "something before it": (lambda: b"PK" + bytes(62) + archive(HONEST), "no directory at the stated offset"),
    "long numbers": (lambda: made.as_zip64(archive(HONEST)), None),
    "long numbers elsewhere": (lambda: made.as_zip64(archive(HONEST), place=7), "no directory at the stated offset|damaged"),
    "no long numbers": (lambda: made.as_zip64(archive(HONEST)).replace(b"PK\6\6", b"PK\6\7"), "directory at the stated|damaged"),
    "long numbers and others": (lambda: _with_offset(made.as_zip64(archive(HONEST)), 7), "no directory at the stated offset"),
    "an offset like a record": (lambda: _with_offset(archive(HONEST), 0x06054B50), "no directory at the stated offset"),
    "a comment that ends like an archive": (lambda: archive(HONEST)[:-2] + b"\x16\0" + archive([])[-22:], "archive"),
    "names alike but for capitals": (lambda: archive([*HONEST, Entry("archive/DATA.PKL", b"")]), r"DATA\.PKL occurs twice"),
    "many entries": (lambda: archive([*HONEST, *(Entry(f"archive/{i}", b"") for i in range(5_000))]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_lie(path, name):
    make, match = ARCHIVES[name]
    if match is None:
        assert outcome(path, make()) == "read"
    else:
        refused(path, make(), match)


# Safetensors headers that lie


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "no such dtype": ({"a": {**FLOATS, "dtype": "Q9"}}, 8),
    "complex": ({"a": {**FLOATS, "dtype": "C64", "shape": [1]}}, 8),
    "8-bit floats": ({"a": {**FLOATS, "dtype": "F8_E4M3", "shape": [8]}}, 8),
    "another size": ({"a": {**FLOATS, "shape": [3]}}, 8),
    "overflowing sizes": ({"a": {**FLOATS, "shape": [2**63, 2**63]}}, 8),
    "huge and empty": ({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, 0),
    "negative sizes": ({"a": {**FLOATS, "shape": [-1, -2]}}, 8),
    "a hundred axes": ({"a": {**FLOATS, "shape": [1] * 100 + [2]}}, 8),
    "overlapping": ({"a": FLOATS, "b": FLOATS}, 8),
    "beyond the end": ({"a": FLOATS}, 4),
    "less than the file": ({"a": FLOATS}, 80),
    "backwards": ({"a": {**FLOATS, "data_offsets": [8, 0]}}, 8),
    "a gap": ({"a": {**FLOATS, "data_offsets": [4, 12]}}, 12),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": FLOATS}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "nothing": ({}, 0),
    "no JSON": (b"{", 0),
    "deep JSON": (b'{"a":' + b"[" * 100_000, 0),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
    ),
    "a path through an array": ({"params/a": FLOATS, "params/a/b": {**FLOATS, "data_offsets": [8, 16]}}, 16),
    "a deep path": ({"params/" + "a/" * 500_000 + "kernel": FLOATS}, 8),
    "a deep name": ({"a." * 500_000 + "weight": FLOATS}, 8),
    "a long name": ({"a" * 10**7: FLOATS}, 8),
    "a deep shape": (b'{"a":{"dtype":"F32","shape":[' + b"1," * 10**6 + b'2],"data_offsets":[0,8]}}', 8),
    "a negative zero": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "arguments of 5,000 digits": ({"__metadata__": {"arguments": '{"depth":' + "9" * 5000 + "}"}, "a": FLOATS}, 8),
    "an empty path": ({"params/": FLOATS}, 8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_that_lie(path, name):
    header, count = HEADERS[name]
    refused(path, made.safetensors_file(header, bytes(count)))


@pytest.mark.parametrize("metadata", [None, {}])
def test_no_metadata(path, metadata):
    path.write_bytes(made.safetensors_file({"__metadata__": metadata, "a": FLOATS}, bytes(8)))
    assert weights.read(path).metadata == {}


@pytest.mark.parametrize("length", [2**62, 2**27, 2**25, 9, 10**5])
def test_safetensors_headers_of_another_length(path, length):
    refused(path, made.safetensors_file({"a": FLOATS}, bytes(8), length))


# Damage


@pytest.fixture(scope="module")
def good():
    """One honest file of each format, small enough to try every byte."""
    arrays = {"conv1.weight": np.arange(8, dtype=np.float32).reshape(2, 2, 1, 2), "fc.bias": np.ones(3, np.float16)}
    header, data = {"__metadata__": {"model": "x"}}, b""
    for name, array in arrays.items():
        dtype = {"float32": "F32", "float16": "F16"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    files = {kind: made.state_dict_file(kind, arrays) for kind in FORMATS}
    return {**files, "safetensors": made.safetensors_file(header, data)}


@pytest.mark.parametrize("kind", [*FORMATS, "safetensors"])
def test_an_honest_file_is_read(path, good, kind):
    path.write_bytes(good[kind])
    tensors = weights.read(path).tensors
    np.testing.assert_array_equal(tensors["conv1.weight"].ravel(), np.arange(8))
    np.testing.assert_array_equal(tensors["fc.bias"], 1)


@pytest.mark.parametrize("kind", [*FORMATS, "safetensors"])
def test_cut_off_at_every_sixteenth(path, good, kind):
    content = good[kind]
    for sixteenth in range(16):
        refused(path, content[: len(content) * sixteenth // 16])
    refused(path, content[:-1])


@pytest.mark.parametrize("kind", [*FORMATS, "safetensors"])
def test_one_flipped_byte_anywhere(path, good, kind):
    """Every byte; most belong to headers. In the numbers, only an archive's checksum can show a change."""
    content = bytearray(good[kind])
    seen = set()
    for at in range(len(content)):
        flip = 1 << at % 9 if at % 9 < 8 else 0xFF
        content[at] ^= flip
        seen.add(outcome(path, content))
        content[at] ^= flip
    assert seen == {"read", "refused"}


def test_a_flipped_byte_in_the_pickle_or_in_the_numbers_of_an_archive_is_seen(path, good):
    content = bytearray(good["zip"])
    pickled = content.index(b"\x80\x02")
    numbers = content.index(np.arange(8, dtype=np.float32).tobytes())
    for at in [*range(pickled, pickled + 300, 7), *range(numbers, numbers + 32)]:
        content[at] ^= 0x10
        refused(path, content, "checksum")
        content[at] ^= 0x10


# Fuzzing; thousands more in benchmarks/fuzz_weights.py

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(
        [tensor(), storage(), dictionary([("a", tensor())]), text("state_dict"), b"(", b"t", b"R", b"}", b"q\0", b"h\0"]
    ),
    st.sampled_from([named(name) for name in made.NAMES]),
    st.binary(max_size=4),
)


@QUICK
@given(opcodes=st.lists(PIECES, max_size=30).map(b"".join), form=st.sampled_from(list(FORMATS)))
def test_any_opcodes(path, opcodes, form):
    outcome(path, FORMATS[form](whole(opcodes)))


@QUICK
@given(data=st.data(), kind=st.sampled_from([*FORMATS, "safetensors"]))
def test_any_damage(path, good, data, kind):
    content = bytearray(good[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at, end = sorted(data.draw(st.integers(0, len(content))) for _ in range(2))
        content[at : min(end, at + 16)] = data.draw(st.binary(max_size=16))
    outcome(path, content)


@QUICK
@given(content=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\3\4", made.MAGIC, b"\2\0\0\0\0\0\0\0{}", b"\x80"]))
def test_any_bytes(path, content, start):
    outcome(path, start + content)


def test_every_opcode_that_is_read_is_one_of_pythons():
    assert set(pickles._OPCODES) <= set(OPCODES)
    dangerous = {pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX, pickle.PERSID}
    assert not set(pickles._OPCODES) & dangerous
