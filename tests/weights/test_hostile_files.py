"""Files made to do harm, and files harmed: nothing happens but a UserError, within bounded memory."""

import argparse
import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from clip_jax.errors import UserError
from clip_jax.weights import load_variables, save
from clip_jax.weights.tensor_file import read
from clip_jax.weights.unpickle import unpickle

STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
)


def tensor_pickle(numel=4, offset=0, size=(4,), stride=(1,)):
    """{"x": tensor} with the numbers of our choice."""

    def number(value):
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    tensor = STORAGE + number(numel) + b"tQ" + number(offset) + numbers(size) + numbers(stride)
    return b"\x80\x02}X\x01\x00\x00\x00x" + tensor + b"\x89ccollections\nOrderedDict\n)RtRs."


def write_archive(path, data_pkl, entries=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/version", "3\n")
        for name, content in entries or [("archive/data/0", np.arange(4, dtype="<f4").tobytes())]:
            archive.writestr(name, content)
    return path


def refused(path, match):
    with pytest.raises(UserError, match=match):
        read(path)


def test_the_pickles_made_here_are_otherwise_good(tmp_path):
    path = write_archive(tmp_path / "a.pt", tensor_pickle())
    np.testing.assert_array_equal(read(path).tensors["x"], [0, 1, 2, 3])
    np.testing.assert_array_equal(torch.load(path, weights_only=True)["x"], [0, 1, 2, 3])
    path = write_archive(tmp_path / "b.pt", tensor_pickle(offset=1, size=(2, 1), stride=(2, 7)))
    np.testing.assert_array_equal(read(path).tensors["x"], [[1], [3]])


class Harm:
    """An object whose pickle, when loaded, creates a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", ["system", "eval", "exec", "open", "popen"])
def test_pickles_that_run_code(tmp_path, protocol, function):
    victim = tmp_path / "victim"
    python = f"open({str(victim)!r}, 'w')"
    harm = {
        "system": Harm(os.system, f"touch {victim}"),
        "eval": Harm(eval, python),
        "exec": Harm(exec, python),
        "open": Harm(open, str(victim), "w"),
        "popen": Harm(os.popen, f"touch {victim}"),
    }[function]
    data = pickle.dumps({"state_dict": harm}, protocol)
    refused(write_archive(tmp_path / "a.pt", data), "opcode|nothing was executed|damaged")
    with pytest.raises(UserError):
        unpickle(data, lambda *_: np.zeros(4, np.float32))
    assert not victim.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02c__builtin__\neval\n.",
        b"\x80\x02ccollections\ndeque\n)R.",
        b"\x80\x02ctorch\nload\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n.",
        b"\x80\x02c__torch__\nX\n)\x81.",
        b"(i__main__\nX\n.",
        b"(cos\nsystem\no.",
        b"\x80\x02\x82\x01.",
    ],
    ids=["reduce", "stack global", "eval", "class", "torch.load", "old rebuild", "prefix", "inst", "obj", "ext"],
)
def test_names_that_are_not_allowed(data):
    with pytest.raises(UserError, match=r"nothing was executed|opcode"):
        unpickle(data, lambda *_: np.zeros(4, np.float32))


def test_nobody_is_sent_to_load_it_unsafely(tmp_path):
    """What runs code is refused, under names that are passed over too, and so is the way round by a bare pickle."""
    victim = tmp_path / "victim"
    state = {"state_dict": {}, "args": argparse.Namespace(output=Harm(os.system, f"touch {victim}"))}
    refused(
        write_archive(tmp_path / "a.pt", pickle.dumps(state, 2)), r"system.*nothing was executed.*weights_only=True"
    )
    (tmp_path / "b.pt").write_bytes(pickle.dumps(state, 2))
    refused(tmp_path / "b.pt", r"may run programs.*weights_only=True")
    assert not victim.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02c__torch__.a\nB\n)R.",  # a class called instead of built
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # a function built
        b"\x80\x02ccollections\nOrderedDict\n(]tR.",  # with arguments
        b"\x80\x02K\x01}b.",  # state of a number
        b"\x80\x02)}b.",
        b"\x80\x02]K\x01K\x02s.",  # items of a list
        b"\x80\x02}K\x01a.",  # append to a dict
        b"\x80\x02})K\x01s.",  # a tuple as key
        b"\x80\x02(tQ.",  # an empty persistent id
        b"\x80\x02h\x05.",  # memo that was never set
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02.",
        b"\x80\x02(K\x01K\x02\x86R.",  # takes beyond a mark
        b"\x80\x02r\xff\xff\xff\xff.",  # an enormous memo index on an empty stack
        b"\x80\x02Nr\xff\xff\xff\xff\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BYTEARRAY8 of 8 EiB
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02I" + b"9" * 10000 + b"\n.",
        b"\x80\x02K",
        b"",
    ],
)
def test_malformed_pickles(data):
    tracemalloc.start()
    with pytest.raises(UserError):
        unpickle(data, lambda *_: np.zeros(4, np.float32))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "ending",
    [b")\x81.", b"Q.", b"N\x93.", b")R."],
    ids=["built", "persistent", "named", "called"],
)
def test_values_too_long_to_print(ending):
    """A tuple of twice a tuple of twice a tuple ...: 2^20 numbers in a few bytes, which no message may spell out."""
    data = b"\x80\x04K\x01" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(20)) + ending
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        unpickle(data, lambda *_: np.zeros(4, np.float32))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(str(error.value)) < 500


def test_long_names_are_not_multiplied(tmp_path):
    name = b"X" + struct.pack("<I", 10**5) + b"n" * 10**5
    module = b"c__torch__.a\nB\n)\x81}"
    data = b"\x80\x02" + module + name + module + tensor_pickle()[3:-2] + b"sbsb."
    refused(write_archive(tmp_path / "a.pt", data), "longer than 1000")


@pytest.mark.parametrize(
    "numbers",
    [
        {"numel": 5},
        {"numel": -1},
        {"numel": 2**62},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"size": (5,)},
        {"size": (-4,)},
        {"size": (2**60,)},
        {"size": (2**60,), "stride": (0,)},  # one element that would be expanded to exabytes
        {"size": (2, 2**62), "stride": (0, 0)},
        {"size": (4,), "stride": (2,)},
        {"size": (4,), "stride": (-1,)},
        {"size": (4,), "stride": (2**62,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (1,) * 70, "stride": (1,) * 70},
    ],
    ids=str,
)
def test_tensors_outside_their_storage(tmp_path, numbers):
    refused(write_archive(tmp_path / "a.pt", tensor_pickle(**numbers)), "tensor|storage")


def test_tensors_that_share_their_storage_are_bounded(tmp_path):
    one = tensor_pickle(numel=1000, size=(1000,))[3:-2]
    names = [b"X\x01\x00\x00\x00" + bytes([65 + i]) + one[6:] for i in range(26)]
    data = b"\x80\x02}(" + b"".join(names) + b"u."
    path = write_archive(tmp_path / "a.pt", data, [("archive/data/0", bytes(4000))])
    refused(path, "overlap")


def test_deep_and_cyclic_modules(tmp_path):
    build = b"c__torch__.a\nB\n)\x81"
    cycle = b"\x80\x02" + build + b"q\x00}X\x01\x00\x00\x00mh\x00sb."
    refused(write_archive(tmp_path / "cycle.pt", cycle), "tree")
    deep = b"\x80\x02" + (build + b"}X\x01\x00\x00\x00m") * 100 + b"N" + b"sb" * 100 + b"."
    refused(write_archive(tmp_path / "deep.pt", deep), "too deep")
    nested = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
    refused(write_archive(tmp_path / "nested.pt", nested), "list")


@pytest.mark.parametrize(
    ("name", "match"),
    [("../x", "outside"), ("/etc/x", "outside"), ("archive/../../x", "outside"), ("other/data/0", "outside")],
)
def test_paths_in_zip_names(tmp_path, name, match):
    path = write_archive(tmp_path / "a.pt", tensor_pickle(), [("archive/data/0", bytes(16)), (name, b"?")])
    refused(path, match)


def test_duplicate_zip_names(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = write_archive(tmp_path / "a.pt", tensor_pickle(), [("archive/data/0", bytes(16))] * 2)
    refused(path, "same name")


def test_zip_bombs(tmp_path):
    bomb = write_archive(
        tmp_path / "a.pt", tensor_pickle(2**24, size=(2**24,)), [("archive/data/0", bytes(2**26))], zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 2**17
    refused(bomb, "compressed")
    nested = write_archive(tmp_path / "b.pt", tensor_pickle(), [("archive/data/0", bomb.read_bytes())])
    refused(nested, "storage")


def test_zip_without_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x" * 100)
    refused(tmp_path / "a.zip", "data.pkl")


def test_truncated_archives(archive, tmp_path):
    content = archive[2].read_bytes()
    for keep in (0, 1, 10, 100, len(content) // 2, len(content) - 23, len(content) - 1):
        (tmp_path / "a.pt").write_bytes(content[:keep])
        refused(tmp_path / "a.pt", "short|damaged")


def test_flipped_bits_in_tensors_are_noticed(archive, tmp_path):
    content = bytearray(archive[2].read_bytes())
    with zipfile.ZipFile(archive[2]) as entries:
        offsets = [e.header_offset + 200 for e in entries.infolist() if "/data/" in e.filename and e.file_size > 4096]
    for offset in offsets[::7]:
        content[offset] ^= 1
        (tmp_path / "a.pt").write_bytes(content)
        refused(tmp_path / "a.pt", "CRC-32")
        content[offset] ^= 1


def test_old_and_foreign_files(tmp_path):
    torch.save({"x": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", r"1\.6 .*torch\.load\(FILE, weights_only=True\)")
    (tmp_path / "text.pt").write_text("something else entirely")
    refused(tmp_path / "text.pt", "neither")


def safetensors(path, header, content=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return path


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"x": ENTRY}, 2**63),
        ({"x": ENTRY}, 2**64 - 1),
        ({"x": ENTRY}, 10**6),
        ({"x": ENTRY}, 5),
        ({"x": ENTRY | {"shape": [5]}}, None),
        ({"x": ENTRY | {"shape": [-4]}}, None),
        ({"x": ENTRY | {"shape": [2**62, 4]}}, None),
        ({"x": ENTRY | {"shape": [4.0]}}, None),
        ({"x": ENTRY | {"shape": "4"}}, None),
        ({"x": ENTRY | {"shape": [4] + [1] * 70}}, None),
        ({"x": ENTRY | {"dtype": "F31"}}, None),
        ({"x": ENTRY | {"dtype": ["F32"]}}, None),
        ({"x": ENTRY | {"data_offsets": [0, 2**62]}}, None),
        ({"x": ENTRY | {"data_offsets": [-16, 0]}}, None),
        ({"x": ENTRY | {"data_offsets": [16, 0]}}, None),
        ({"x": ENTRY | {"data_offsets": [0]}}, None),
        ({"x": ENTRY, "y": ENTRY}, None),
        ({"x": ENTRY | {"shape": [2], "data_offsets": [8, 16]}}, None),
        ({"x": ENTRY | {"shape": [2], "data_offsets": [0, 8]}}, None),
        ({"x": 3}, None),
        ({}, None),
        (b'{"x": {}, "x": {}}', None),
        (b"{" * 20, None),
        (b'{"x":' + b"[" * 100_000, None),
        (b'{"x": ' + b"9" * 5000 + b"}", None),
        (b'{"\xff": 1}', None),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, header, length):
    refused(safetensors(tmp_path / "a.safetensors", header, length=length), "header|tensors")


def test_safetensors_that_are_fine(tmp_path):
    path = safetensors(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "x": ENTRY})
    assert read(path).tensors["x"].shape == (4,)


def _mutated(content, rng):
    """One of: flip bits, overwrite with extreme values, cut, repeat or remove a piece."""
    data = bytearray(content)
    position = int(rng.integers(len(data)))
    match rng.integers(6):
        case 0:
            for at in rng.integers(len(data), size=rng.integers(1, 8)):
                data[at] ^= 1 << int(rng.integers(8))
        case 1:
            data[position] = int(rng.integers(256))
        case 2:
            width = int(rng.choice([1, 2, 4, 8]))
            value = rng.choice([b"\xff", b"\x7f", b"\x00", b"\x80"]) * width
            data[position : position + width] = value
        case 3:
            del data[position:]
        case 4:
            piece = data[position : position + int(rng.integers(1, 64))]
            data[position:position] = piece
        case 5:
            del data[position : position + int(rng.integers(1, 64))]
    return bytes(data)


def test_ten_thousand_mutations(tmp_path):
    """Whatever is changed in a file, reading it works or raises UserError; memory does not grow.

    Half of them change a pickle by itself, which in a file its CRC-32 shields.
    """
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, tmp_path / "safetensors")
    files = [(tmp_path / "safetensors").read_bytes(), write_archive(tmp_path / "zip", tensor_pickle()).read_bytes()]
    module = b"\x80\x02c__torch__.a\nB\n)\x81}" + tensor_pickle()[3:-2] + b"sb."
    storage = np.zeros(4, np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (tmp_path / "mutated").open("wb", buffering=0) as file:
        for round_ in range(10_000):
            try:
                if round_ % 2:
                    unpickle(_mutated((tensor_pickle(), module)[round_ // 2 % 2], rng), lambda *_: storage)
                else:
                    file.seek(0)
                    file.write(_mutated(files[round_ // 2 % 2], rng))
                    file.truncate()
                    read(file.name)
                outcomes["read"] += 1
            except UserError:
                outcomes["refused"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert min(outcomes.values()) > 300, outcomes
    assert grown < 100 * 1024, f"{grown} KiB"


def test_mutated_archive_of_a_model(small, tmp_path):
    """The whole way to variables: a damaged model file raises UserError too."""
    save(tmp_path / "m", *small, "open_clip")
    file = tmp_path / "m" / "open_clip_model.safetensors"
    content, rng = file.read_bytes(), np.random.default_rng(1)
    length = int.from_bytes(content[:8], "little")
    for _ in range(200):
        mutated = _mutated(content[: 8 + length], rng) + content[8 + length :]
        file.write_bytes(mutated)
        try:
            load_variables(tmp_path / "m")
        except UserError:
            continue
