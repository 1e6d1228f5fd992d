"""What a damaged shard delivers and counts, case by case; nothing is lost in silence, nothing hangs or fills memory."""

import contextlib
import gzip
import io
import re
import resource
import struct
import tarfile
import zlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from clip_jax.data import tar, tfrecord
from clip_jax.data.access import Access
from clip_jax.data.damage import REASONS, Damaged
from clip_jax.data.order import replacement_index, sample_index
from clip_jax.data.pipeline import InputConfig, TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.sources import source_config
from clip_jax.data.targets import Texts
from clip_jax.errors import UserError
from clip_jax.processing import Augment, Preprocess, decode
from clip_jax.processing.tokenizers import OpenAITokenizer
from tests.data.make_shards import add, members, photo, record, write_tar, write_tfrecord

COUNT = 12
BLOCK = 512
STOP, SKIP = InputConfig(on_damage="stop"), InputConfig(on_damage="skip", max_damaged=1.0)


def tar_bytes(indices=range(COUNT), content=members, **kwargs):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, **kwargs) as archive:
        for index in indices:
            for extension, data in content(index).items():
                add(archive, f"{index:08}.{extension}", data)
    return buffer.getvalue()


WHOLE = tar_bytes()
with tarfile.open(fileobj=io.BytesIO(WHOLE)) as _archive:
    HEADERS = {item.name: item.offset for item in _archive}
    DATA = {item.name: (item.offset_data, item.size) for item in _archive}


def name(index, extension="jpg"):
    return f"{index:08}.{extension}"


def changed(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def flipped(content, at):
    return changed(content, at, bytes([content[at] ^ 0x10]))


def with_member(kind=tarfile.REGTYPE, member="extra.jpg", linkname="", size=None, before=5):
    """A shard with one more member before sample 5, whose header may claim any size."""
    info = tarfile.TarInfo(member)
    info.type, info.linkname = kind, linkname
    info.size = 0 if size is None else size
    header = info.tobuf(tarfile.GNU_FORMAT)
    at = HEADERS[name(before)]
    return WHOLE[:at] + header + WHOLE[at:]


def replaced(index, **fields):
    """A shard whose sample `index` has other members; None leaves one out."""
    return tar_bytes(
        content=lambda i: {k: v for k, v in (members(i) | (fields if i == index else {})).items() if v is not None}
    )


def huge_png():
    """40,000 × 40,000 pixels of zeros in a few hundred kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(40_001)) for _ in range(200)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# From the name of a case: the shard's bytes, the samples it still has, and the damage seen on opening and on reading.
OPENING = {
    "cut at a header": (WHOLE[: HEADERS[name(7)]], range(7), {"cut": 1}),
    "cut at a header within a sample": (WHOLE[: HEADERS[name(7, "json")]], range(7), {"cut": 1}),
    "cut within a header": (WHOLE[: HEADERS[name(7)] + 100], range(7), {"cut": 1}),
    "cut within data": (WHOLE[: DATA[name(7)][0] + 300], range(7), {"cut": 1}),
    "cut within padding": (WHOLE[: sum(DATA[name(7, "json")]) + 3], range(7), {"cut": 1}),
    "a header of zeros": (changed(WHOLE, HEADERS[name(7)], bytes(BLOCK)), [*range(7), *range(8, 12)], {"header": 1}),
    "a sample of zeros": (
        changed(WHOLE, HEADERS[name(7)], bytes(HEADERS[name(8)] - HEADERS[name(7)])),
        [*range(7), *range(8, 12)],
        {"header": 1},
    ),
    "a flipped bit in a header": (flipped(WHOLE, HEADERS[name(7)] + 5), [*range(7), *range(8, 12)], {"header": 1}),
    "a flipped bit in a caption's header": (
        flipped(WHOLE, HEADERS[name(7, "txt")] + 130),
        [*range(7), *range(8, 12)],
        {"header": 1},
    ),
    "an empty file": (b"", [], {"cut": 1}),
    "no tar file": (b"<html>404 not found</html>" * 100, [], {"header": 1}),
    "a duplicate key": (tar_bytes([*range(COUNT), 3]), range(12), {"duplicate_key": 1}),
    "a member that claims 5 GB": (with_member(size=5 * 2**30), range(12), {"too_large": 1}),
    "a member that claims 200 MB": (with_member(size=200 * 2**20), range(5), {"cut": 1}),
    "a symbolic link": (with_member(tarfile.SYMTYPE, linkname="/etc/passwd"), range(12), {"link": 1}),
    "a hard link": (with_member(tarfile.LNKTYPE, linkname=name(0)), range(12), {"link": 1}),
    "a device": (with_member(tarfile.CHRTYPE), range(12), {"link": 1}),
    "a pipe": (with_member(tarfile.FIFOTYPE), range(12), {"link": 1}),
    "a folder": (with_member(tarfile.DIRTYPE, "folder"), range(12), {}),
    "an absolute name": (with_member(member="/etc/cron.d/x.jpg"), range(12), {"unsafe_path": 1}),
    "a name with ..": (with_member(member="../../x.jpg"), range(12), {"unsafe_path": 1}),
}
_IMAGE_START, _IMAGE_SIZE = DATA[name(7)]
READING = {
    "HTML named .jpg": (replaced(7, jpg=b"<html>404 not found</html>"), {"image": 1}),
    "an image of no bytes": (replaced(7, jpg=b""), {"image": 1}),
    "a cut image": (replaced(7, jpg=photo(7)[:500]), {"image": 1}),
    "an image whose data is zeros": (changed(WHOLE, _IMAGE_START, bytes(_IMAGE_SIZE)), {"image": 1}),
    "an image of 40,000 x 40,000 pixels": (replaced(7, jpg=None, png=huge_png()), {"image": 1}),
    "no image": (replaced(7, jpg=None), {"image": 1}),
    "no caption": (replaced(7, txt=None), {"caption": 1}),
    "an empty caption": (replaced(7, txt=b" \n"), {"caption": 1}),
    "a caption that is not UTF-8": (replaced(7, txt=b"caf\xe9"), {"caption": 1}),
}


def open_tar(path):
    return source_config("tar", {"path": str(path), "block": 1}).open(Access())


def delivered(source, config, epochs=1):
    """The numbers of the samples of some epochs, and the damage counted."""
    reader = TrainReader(
        Mixture((source,), (1.0,), 5, len(source)), Preprocess(8), Texts(OpenAITokenizer(16)), Augment()
    )
    with contextlib.closing(TrainBatches(reader, config)) as batches:
        rows = [row for _ in range(epochs) for row in next(batches)["text"]]
        return [int(re.search(r"photo number ([\d ]+)", decode(row.tolist()))[1].replace(" ", "")) for row in rows], {
            reason: number for reason, number in batches.damage.items() if number
        }


@pytest.mark.parametrize("case", OPENING)
def test_damage_of_a_shard(tmp_path, case):
    content, left, damage = OPENING[case]
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(tar_bytes(range(20, 30)))  # the shards after it are read all the same
    source = open_tar(tmp_path / "?.tar")
    numbers, counted = delivered(source, SKIP)
    assert sorted(numbers) == [*left, *range(20, 30)]
    assert counted == damage
    assert Counter(item.reason for item in source.damage) == damage
    if damage:
        with pytest.raises(UserError, match=r"a\.tar, offset \d+: .*mend the data, or .*on_damage=skip"):
            delivered(source, STOP)
    else:
        assert sorted(delivered(source, STOP)[0]) == sorted(numbers)


@pytest.mark.parametrize("case", READING)
def test_damage_of_a_sample(tmp_path, case):
    content, damage = READING[case]
    (tmp_path / "a.tar").write_bytes(content)
    source = open_tar(tmp_path / "a.tar")
    assert len(source) == COUNT and not source.damage
    first = name(7) if name(7) in HEADERS else name(7, "txt")
    with pytest.raises(UserError, match=rf"a\.tar, offset {HEADERS[first]}: key '{7:08}'"):
        delivered(source, STOP)
    numbers, counted = delivered(source, SKIP)
    assert counted == damage
    expected = sample_index(5, np.arange(COUNT), COUNT)
    position = expected.tolist().index(7)
    expected[position] = replacement_index(5, position, 0, COUNT)
    assert numbers == expected.tolist()


def test_a_flipped_bit_of_an_image_is_seen_by_nobody_or_by_the_decoder(tmp_path):
    """Tar has no checksum of what it holds: only what the decoder refuses is counted."""
    (tmp_path / "a.tar").write_bytes(flipped(WHOLE, DATA[name(7)][0] + DATA[name(7)][1] // 2))
    numbers, counted = delivered(open_tar(tmp_path / "a.tar"), SKIP)
    assert len(numbers) == COUNT and counted in ({}, {"image": 1})


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_cut_gzip_shard_gives_what_came_before(tmp_path, cut):
    packed = gzip.compress(WHOLE)
    (tmp_path / "a.tar.gz").write_bytes(packed[:-cut])
    source = open_tar(tmp_path / "a.tar.gz")
    numbers, counted = delivered(source, SKIP)
    assert sorted(numbers) == list(range(len(numbers))) and len(numbers) >= COUNT - 1
    assert sum(counted.values()) == 1


def test_a_gzip_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        for _ in range(200):
            file.write(bytes(2**20))
    write_tar(tmp_path / "b.tar.gz", range(3), "w:gz")
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    source = open_tar(tmp_path / "*.tar.gz")
    assert [item.reason for item in source.damage] == ["too_large"] and len(source) == 3
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 2**20


@pytest.mark.parametrize(
    ("damage", "left", "reasons"),
    [
        (lambda whole, at: whole[: at[7]], 7, []),  # TFRecord has no mark at its end: seen against the index only
        (lambda whole, at: whole[: at[7] + 5], 7, ["cut"]),
        (lambda whole, at: whole[: at[7] + 500], 7, ["cut"]),
        (lambda whole, at: flipped(whole, at[7] + 1), 11, ["header"]),
        (lambda whole, at: changed(whole, at[7], bytes(12)), 11, ["header"]),
        (lambda whole, at: whole[: at[7]] + struct.pack("<Q", 5 * 2**30) + whole[at[7] + 8 :], 11, ["header"]),
        (lambda whole, at: b"", 0, ["cut"]),
    ],
)
def test_damage_of_a_tfrecord_shard(tmp_path, damage, left, reasons):
    write_tfrecord(tmp_path / "a.tfrecord", range(COUNT))
    whole = (tmp_path / "a.tfrecord").read_bytes()
    spans, _ = tfrecord.scan(lambda offset, size: whole[offset : offset + size], len(whole))
    damaged = damage(whole, [offset for offset, _ in spans])
    records, found = tfrecord.scan(lambda offset, size: damaged[offset : offset + size], len(damaged))
    assert len(records) == left and [item.reason for item in found] == reasons


def test_a_record_that_claims_5_gb_with_a_valid_checksum_is_not_read():
    huge = record(b"")[:0] + struct.pack("<Q", 5 * 2**30)
    from tests.data.make_shards import masked_crc

    content = record(b"a" * 40) + huge + masked_crc(huge) + b"x" * 50 + record(b"b" * 60)
    records, found = tfrecord.scan(lambda offset, size: content[offset : offset + size], len(content))
    assert [item.reason for item in found] == ["too_large"]
    assert [tfrecord.content(content[offset : offset + size]) for offset, size in records] == [b"a" * 40, b"b" * 60]


def test_a_flipped_bit_of_a_record_is_seen(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", range(COUNT))
    path = tmp_path / "a.tfrecord"
    path.write_bytes(flipped(path.read_bytes(), 5000))
    source = source_config("tfrecord", {"path": str(path), "block": 1}).open(Access())
    numbers, counted = delivered(source, SKIP)
    assert counted == {"checksum": 1} and len(numbers) == COUNT
    with pytest.raises(UserError, match=r"a\.tfrecord, offset \d+: the record does not match its checksum"):
        delivered(source, STOP)


def test_a_shard_that_was_cut_after_its_index_was_made_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(WHOLE)
    source = open_tar(path)
    with open(path, "r+b") as file:
        file.truncate(HEADERS[name(7)] + 600)
    numbers, counted = delivered(source, SKIP)
    assert counted["cut"] >= 5 and set(numbers) <= set(range(7)) and len(numbers) == COUNT
    with pytest.raises(UserError, match=r"a\.tar, offset \d+: expected \d+ bytes, got \d+"):
        delivered(source, STOP)
    assert [item.reason for item in open_tar(path).damage] == ["cut"]


def test_too_much_damage_stops_a_run_that_skips(tmp_path):
    content = tar_bytes(content=lambda index: members(index) | ({"jpg": b"no"} if index % 2 else {}))
    (tmp_path / "a.tar").write_bytes(content)
    config = InputConfig(on_damage="skip", max_damaged=0.1)
    with pytest.raises(UserError, match=r"\d+ of \d+ samples are damaged, more than max_damaged=0.1: \d+ image"):
        delivered(open_tar(tmp_path / "a.tar"), config, epochs=10)


def test_a_source_without_a_sound_sample_ends(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(content=lambda index: members(index) | {"jpg": b"no"}))
    with pytest.raises(UserError, match="image"):
        delivered(open_tar(tmp_path / "a.tar"), SKIP)


def test_hosts_stay_in_step_whatever_is_damaged(tmp_path):
    (tmp_path / "a.tar").write_bytes(replaced(7, jpg=b"no"))
    source = open_tar(tmp_path / "a.tar")
    reader = TrainReader(Mixture((source,), (1.0,), 5, 12), Preprocess(8), Texts(OpenAITokenizer(16)), Augment())
    shares, whole = [], None
    for index, count in ((0, 1), (0, 2), (1, 2)):
        with contextlib.closing(TrainBatches(reader, SKIP, 0, index, count)) as batches:
            texts = [next(batches)["text"] for _ in range(4)]
        whole = texts if count == 1 else whole
        shares += [texts] if count == 2 else []
    for step, text in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), text)


def test_processes_skip_and_stop_as_threads_do(tmp_path):
    (tmp_path / "a.tar").write_bytes(READING["a cut image"][0])
    source = open_tar(tmp_path / "a.tar")
    in_processes = InputConfig(on_damage="skip", max_damaged=1.0, data_processes=2)
    assert delivered(source, in_processes, 2) == delivered(source, SKIP, 2)
    with pytest.raises(UserError, match="key '00000007': image bytes"):
        delivered(source, InputConfig(data_processes=2), 2)


def test_ten_thousand_mutations_raise_nothing_else_and_take_no_memory():
    generator = np.random.default_rng(0)
    small = tar_bytes(range(2), lambda index: {"jpg": b"j" * 600, "txt": b"t" * 20})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        damaged = bytearray(small)
        for at in generator.integers(0, len(small), generator.integers(1, 6)):
            damaged[at] = generator.integers(256)
        damaged = bytes(damaged[: generator.integers(1, len(small) + 1)])
        samples, found = tar.scan(lambda offset, size: damaged[offset : offset + size], len(damaged))  # noqa: B023
        assert all(item.reason in REASONS for item in found)
        for offset, size in samples:
            with contextlib.suppress(Damaged):
                tar.parse(damaged[offset : offset + size])
        assert all(first[0] + first[1] <= second[0] for first, second in pairwise(samples))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_deeply_nested_json_member_is_damage(tmp_path):
    content = tar_bytes(content=lambda index: members(index) | {"json": b"[" * 200_000})
    (tmp_path / "a.tar").write_bytes(content)
    source = source_config("tar", {"path": str(tmp_path / "a.tar"), "caption_field": "alt", "block": 1}).open(Access())
    with pytest.raises(Damaged, match="its json is damaged"):
        source[0]


def test_a_sample_of_many_large_members_is_not_read(tmp_path):
    """Each member passes by itself; together they are 5 GB, of which the file (with holes) holds only the headers."""
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(WHOLE[: HEADERS[name(5)]])
        for number in range(21):
            info = tarfile.TarInfo(f"x.{number}")
            info.size = 2**28 - 512
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.seek(info.size, io.SEEK_CUR)
        file.write(WHOLE[HEADERS[name(5)] :])
    source = open_tar(tmp_path / "a.tar")
    assert [item.reason for item in source.damage] == ["too_large"]
    assert sorted(delivered(source, SKIP)[0]) == list(range(COUNT))
