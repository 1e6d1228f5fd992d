"""The layout of the collection `clip-benchmark/wds_*`."""

import io
import struct
import tarfile

import numpy as np
import pytest

from clip_jax.data import shards
from clip_jax.data.damage import Damaged
from clip_jax.data.wds import WdsSource, classes_of, is_wds
from clip_jax.errors import UserError
from tests.data.make_shards import add, photo


def write(folder, members, kind="", count=2, names=("cat", "dog", "bird")):
    """`members(k)` gives the members of sample k besides its image."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names))
    if kind:
        (folder / "dataset_type.txt").write_text(kind + "\n")
    for shard in range(count):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for number in range(3 * shard, 3 * shard + 3):
                add(archive, f"s{number:07}.jpg", photo(number))
                for extension, content in members(number).items():
                    add(archive, f"s{number:07}.{extension}", content)
    (folder / "test" / "nshards.txt").write_text(f"{count}\n")
    return str(folder)


def npy(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def test_shards_are_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_FEW_SHARDS", 11)  # no processes for so little
    path = write(tmp_path / "set", lambda k: {"cls": str(k).encode()}, count=11)
    source = WdsSource(path)
    assert [source[index].label for index in range(33)] == list(range(33))
    assert source[32].image == photo(32) and "10.tar, offset" in source.where(32)
    assert (source.type, source.class_names, source.templates) == ("classification", ("cat", "dog", "bird"), ())
    assert is_wds(path) and is_wds(path, whole=True) and not is_wds(path, "train")


def test_several_classes_and_captions(tmp_path):
    flags = [[0, 1, 1], [0, 0, 0], [1, 0, -1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]
    source = WdsSource(write(tmp_path / "many", lambda k: {"npy": npy(np.array(flags[k]))}, "multilabel"))
    assert [source[index].label for index in range(6)] == [(1, 2), (), (0,), (0,), (1,), (0, 1, 2)]
    source = WdsSource(write(tmp_path / "texts", lambda k: {"txt": f"one {k}\n\n two ä".encode()}, "retrieval"))
    assert source[4].captions == ("one 4", "two ä")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy(np.array([1, 0]))[:-1],
        npy(np.array([1, 0])) + b"\0",
        npy(np.eye(2)),
        npy(np.array(["a", "b"])),
        npy(np.array([object()]), allow_pickle=True),
        npy(np.zeros(2**17 + 1, np.int8)),
        npy(np.array([1, 0])).replace(b"(2,)", b"(9**99,)"),
        npy(np.array([1, 0])).replace(b"(2,), }", b"(9999999999,), }"),
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 60) + b"__import__('os').system('true')".ljust(59) + b"\n",
        b"\x93NUMPY\x07\x00" + npy(np.array([1]))[8:],
    ],
)
def test_a_hostile_npy_is_damage(content):
    with pytest.raises(Damaged, match="npy"):
        classes_of(content)


@pytest.mark.parametrize("count", ["", "two", "0", "-1", "1e3", "1000000000000", "²"])
def test_a_count_of_shards_that_is_none(tmp_path, count):
    path = write(tmp_path / "set", lambda k: {"cls": b"1"})
    (tmp_path / "set" / "test" / "nshards.txt").write_text(count)
    with pytest.raises(UserError, match="expected a number from 1 to 100,000"):
        WdsSource(path)


def test_what_else_is_refused(tmp_path):
    path = write(tmp_path / "set", lambda k: {"cls": b"1"})
    with pytest.raises(UserError, match=r"train has no nshards.txt"):
        WdsSource(path, "train")
    (tmp_path / "set" / "dataset_type.txt").write_text("segmentation")
    with pytest.raises(UserError, match="'segmentation': expected one of classification, multilabel, retrieval"):
        WdsSource(path)
    (tmp_path / "set" / "dataset_type.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"dataset_type.txt is not UTF-8"):
        WdsSource(path)
    (tmp_path / "set" / "dataset_type.txt").unlink()
    (tmp_path / "set" / "classnames.txt").write_bytes(b"a\n" * 2**21 + b"b")
    with pytest.raises(UserError, match=r"classnames.txt has over 4,194,304 bytes"):
        WdsSource(path)
    (tmp_path / "set" / "classnames.txt").write_text("a\n" + "b" * 2_001)
    with pytest.raises(UserError, match=r"classnames.txt has a line of over 2,000 characters"):
        WdsSource(path)
