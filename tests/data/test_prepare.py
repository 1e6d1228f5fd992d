import contextlib
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from clip_jax import cli
from clip_jax.data import prepare
from clip_jax.data.access import Access
from clip_jax.data.preparation import ranges, run
from clip_jax.data.preparation.duplicates import HASH, duplicates
from clip_jax.data.sources import source_config
from clip_jax.errors import UserError
from tests.data.make_shards import add, caption, photo, record, write_tar

# What TFDS calls is deprecated in protobuf 6, which Apache Beam still wants.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")

COUNT = 23


def call(source, destination, *options, processes=1):
    """Prepare, and open what was made."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        prepare.main([str(source), str(destination), f"--processes={processes}", *options])
    training = next(line for line in said.getvalue().splitlines() if line.startswith("In training:"))
    (override,) = shlex.split(training.removeprefix("In training:"))
    fields = cli.load_config("demo", {"data": override.removeprefix("--config.data=")}).data["tfds"]
    return source_config("tfds", fields).open(Access())


def examples(source):
    return [source[index] for index in range(len(source))]


def report_of(destination):
    (path,) = Path(destination).glob("*/1.0.0/report.json")
    return json.loads(path.read_text())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def encoded(image, image_format="JPEG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **settings)
    return buffer.getvalue()


def smooth(seed, size=(160, 120)):
    """An image with large shapes, as photographs have."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def write_folder(folder, images):
    """A folder of (image bytes or None, caption) by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, text) in images.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(text)
    return folder


def tf_example(**fields):
    """A serialized tf.train.Example, without the seconds that importing TensorFlow takes."""
    example = tf_example_pb2.Example()
    for name, value in fields.items():
        example.features.feature[name].bytes_list.value.append(value)
    return example.SerializeToString()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same samples in several formats."""
    folder = tmp_path_factory.mktemp("sources")
    write_folder(folder / "photos", {f"{index:08}.jpg": (photo(index), caption(index)) for index in range(COUNT)})
    write_tar(folder / "00000.tar", range(15))
    write_tar(folder / "00001.tar", range(15, COUNT))
    records = [tf_example(jpg=photo(k), txt=caption(k).encode(), key=f"{k:08}".encode()) for k in range(COUNT)]
    (folder / "all.tfrecord").write_bytes(b"".join(map(record, records)))
    rows = [(f"photos/{index:08}.jpg", caption(index)) for index in range(COUNT)]
    (folder / "list.csv").write_text("filepath,caption\n" + "".join(f"{path},{text}\n" for path, text in rows))
    columns = {"image": [photo(index) for index in range(COUNT)], "caption": [text for _, text in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "all.parquet")
    return folder


@pytest.mark.parametrize("name", ["photos", "tar:{}/0000{{0..1}}.tar", "all.tfrecord", "list.csv", "all.parquet"])
def test_each_format_comes_back_as_it_was(sources, tmp_path, name):
    source = name.format(sources) if ":" in name else sources / name
    prepared = call(source, tmp_path, "--name=mine", "--samples_per_shard=9")
    assert [example.image for example in examples(prepared)] == [photo(index) for index in range(COUNT)]
    assert [example.captions for example in examples(prepared)] == [(caption(index),) for index in range(COUNT)]
    original = prepare.parse_source(str(source), {})[1].open(Access())
    assert [example.key for example in examples(prepared)] == [example.key for example in examples(original)]
    records = tfds.data_source("mine", split="train", data_dir=tmp_path)
    for index, found in enumerate(records):
        np.testing.assert_array_equal(found["image"], pixels(photo(index)))
        assert [text.decode() for text in found["captions"]] == [caption(index)]
        assert found["key"].decode() == original[index].key
    info = tfds.builder_from_directory(tmp_path / "mine/1.0.0").info
    assert info.splits["train"].shard_lengths == [9, 9, 5]
    assert report_of(tmp_path)["left_out"] == {}


def test_labels_keep_their_names(photos_dir, tmp_path):
    prepared = call("tfds:tiny_photos", tmp_path, f"--source.data_dir={photos_dir}", "--source.split=test")
    original = source_config("tfds", {"name": "tiny_photos", "split": "test", "data_dir": photos_dir}).open(Access())
    assert prepared.name == "my_tiny_photos/1.0.0/test"
    assert prepared.class_names == ("cat", "dog")
    for got, wanted in zip(examples(prepared), examples(original), strict=True):
        assert (got.image, got.captions, got.label) == (wanted.image, wanted.captions, wanted.label)


def test_classes_come_with_captions_by_template(tmp_path):
    for number, name in enumerate(("cat", "polar_bear", "cat")):
        (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "animals" / name / f"{number}.jpg").write_bytes(photo(number))
    prepared = call(tmp_path / "animals", tmp_path / "out", "--source.templates=a photo of a {}.,a {}")
    assert prepared.class_names == ("cat", "polar bear")
    assert [example.label for example in examples(prepared)] == [0, 0, 1]
    assert prepared[2].captions == ("a photo of a polar bear.", "a polar bear")


def test_numbers_are_labels_too(tmp_path):
    def content(index):
        return {"jpg": photo(index), "cls": str([3, 0, -1, 2**40][index]).encode()}

    write_tar(tmp_path / "a.tar", range(4), content=content)
    prepared = call(tmp_path / "a.tar", tmp_path / "out")
    assert [example.label for example in examples(prepared)] == [3, 0]
    assert prepared.class_names == ("0", "1", "2", "3")
    assert [example.captions for example in examples(prepared)] == [(), ()]
    assert report_of(tmp_path / "out")["left_out"] == {"unreadable": 2}


def test_pictures_without_files_are_stored_without_loss(tmp_path):
    prepared = call("digits:test", tmp_path)
    original = source_config("digits", {"split": "test"}).open(Access())
    for got, wanted in zip(examples(prepared), examples(original), strict=True):
        np.testing.assert_array_equal(pixels(got.image), np.asarray(wanted.image))
        assert (got.captions, got.label) == (wanted.captions, wanted.label)


def test_images_are_shrunk_and_encoded_only_where_asked(tmp_path):
    large, small, png = smooth(0, (300, 200)), encoded(smooth(1, (90, 120))), encoded(smooth(2, (40, 30)), "PNG")
    palette = smooth(3, (50, 40)).quantize(16)
    files = {
        "a.jpg": encoded(large),
        "b.jpg": small,
        "c.png": png,
        "d.webp": encoded(smooth(4, (50, 40)), "WEBP", lossless=True),
        "e.gif": encoded(palette, "GIF"),
        "f.png": encoded(palette, "PNG", transparency=0),
        "g.jpg": encoded(smooth(5, (2000, 1000))),
    }
    folder = write_folder(tmp_path / "photos", {name: (content, name) for name, content in files.items()})
    got = {example.captions[0]: example.image for example in examples(call(folder, tmp_path / "a", "--max_side=90"))}
    assert pixels(got["a.jpg"]).shape == (90, 135, 3) and pixels(got["g.jpg"]).shape == (90, 180, 3)
    expected = Image.open(io.BytesIO(files["a.jpg"])).resize((135, 90), Image.Resampling.BICUBIC)
    assert np.abs(pixels(got["a.jpg"]).astype(int) - np.asarray(expected)).mean() < 3
    assert {name: got[name] for name in ("b.jpg", "c.png", "f.png")} == {
        "b.jpg": small,
        "c.png": png,
        "f.png": files["f.png"],
    }
    for name in ("d.webp", "e.gif"):
        assert got[name].startswith(b"\x89PNG")
        np.testing.assert_array_equal(pixels(got[name]), pixels(files[name]))
    got = examples(call(folder, tmp_path / "b", "--quality=50"))
    for example in got:
        original = Image.open(io.BytesIO(files[example.captions[0]])).convert("RGB")
        assert example.image == encoded(original, quality=50)


def filtered_folder(folder):
    words = {"short.jpg": "ab\nabcdef", "long.jpg": "x" * 200, "fits.jpg": "a caption"}
    images = {name: (encoded(smooth(1)), text) for name, text in words.items()}
    images |= {
        "small.jpg": (encoded(smooth(2, (300, 30))), "small"),
        "thin.jpg": (encoded(smooth(3, (400, 60))), "thin"),
    }
    return write_folder(folder, images)


def test_filters_and_the_report(tmp_path):
    folder = filtered_folder(tmp_path / "photos")
    limits = ("--min_side=40", "--max_aspect=4", "--min_caption=3", "--max_caption=100")
    prepared = call(folder, tmp_path / "out", *limits, "--samples_per_shard=2")
    assert [example.captions for example in examples(prepared)] == [("a caption",), ("abcdef",)]
    report = report_of(tmp_path / "out")
    assert (report["samples"], report["kept"]) == (5, 2)
    assert report["left_out"] == {"small": 1, "elongated": 1, "caption_length": 1}
    shown = {item["reason"]: (os.path.basename(item["key"]), item["message"]) for item in report["shown"]}
    assert shown["small"] == ("small.jpg", "it has 300 x 30 pixels")
    assert shown["elongated"] == ("thin.jpg", "it has 400 x 60 pixels")
    assert shown["caption_length"] == ("long.jpg", "its captions have 200 characters")
    page = (tmp_path / "out/photos/1.0.0/report.html").read_text()
    assert page.count("<img ") == 3 and "2 of 5 samples are kept" in page
    assert "3 samples" not in page and "min_caption" in page


def write_copies(folder):
    first, other = smooth(1), smooth(2)
    near = first.resize((80, 60), Image.Resampling.BICUBIC)
    images = {
        "a.jpg": (encoded(first, quality=90), "x"),  # too short, so it is not the first of its kind
        "b.jpg": (encoded(first, quality=90), "the first"),
        "c.jpg": (encoded(other), "another"),
        "d.jpg": (encoded(first, quality=90), "again"),
        "e.jpg": (encoded(near, quality=60), "smaller"),
        "f.jpg": (b"no image", "broken"),
        "g.jpg": (b"no image", "broken again"),
    }
    return write_folder(folder, images)


@pytest.mark.parametrize(
    ("kind", "kept", "left_out"),
    [
        ("none", ["the first", "another", "again", "smaller"], {"caption_length": 1, "image": 2}),
        ("exact", ["the first", "another", "smaller"], {"caption_length": 1, "duplicate": 2, "image": 1}),
        ("perceptual", ["the first", "another"], {"caption_length": 1, "duplicate": 2, "image": 2}),
    ],
)
def test_repeated_images_are_left_out(tmp_path, kind, kept, left_out):
    folder = write_copies(tmp_path / "photos")
    prepared = call(folder, tmp_path / "out", f"--dedup={kind}", "--min_caption=2", "--samples_per_shard=3")
    assert [example.captions[0] for example in examples(prepared)] == kept
    report = report_of(tmp_path / "out")
    assert report["left_out"] == left_out
    repeated = [(item["sample"], item["message"]) for item in report["shown"] if item["reason"] == "duplicate"]
    assert (3, "it has the image of sample 1") in repeated or kind == "none"


def duplicates_one_by_one(hashes, distance):
    """The definition: a sample repeats the first earlier one, of those that repeat none, that is equal or near."""
    repeats = []
    for index, (known, high, low) in enumerate(hashes.tolist()):
        earlier = [k for k in range(index) if repeats[k] < 0 and hashes["known"][k] and known]
        near = [
            k for k in earlier if hashes["high"][k] == high and (int(hashes["low"][k]) ^ low).bit_count() <= distance
        ]
        repeats.append(near[0] if near else -1)
    return repeats


@pytest.mark.parametrize("distance", [0, 1, 3, 15])
def test_duplicates_are_those_of_a_comparison_of_all_with_all(distance, monkeypatch):
    monkeypatch.setattr("clip_jax.data.preparation.duplicates._COMPARED", 40)  # a few rows at a time
    generator = np.random.default_rng(distance)
    hashes = np.zeros(300, HASH)
    hashes["known"] = generator.random(300) < 0.9
    hashes["low"] = generator.integers(0, 2**64, 60, np.uint64)[generator.integers(0, 60, 300)]
    for _ in range(4):  # bits that differ, so that chains of near ones arise
        flips = np.uint64(1) << generator.integers(0, 64, 300, np.uint64)
        hashes["low"] ^= np.where(generator.random(300) < 0.2, flips, np.uint64(0))
    expected = duplicates_one_by_one(hashes, distance)
    assert duplicates(hashes, distance).tolist() == expected
    assert 20 < sum(repeats >= 0 for repeats in expected) < 300
    assert duplicates(hashes[:0], distance).tolist() == []


def test_hostile_samples_are_counted_and_left_out(tmp_path, monkeypatch):
    bomb = encoded(Image.new("1", (1, 1)), "PNG")
    size = (40_000).to_bytes(4, "big")
    start = bomb.index(b"IHDR") + 4
    bomb = bomb[:start] + size + size + bomb[start + 8 :]
    bad = {
        "jpg": [b"<html>not found</html>", b"\xff\xd8\xff", photo(1)[:-200], bomb, b"GIF89a" + bytes(50)],
        "txt": [b"caf\xe9", b" "],
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index in range(8):
            add(archive, f"{index}.jpg", photo(index))
            add(archive, f"{index}.txt", b"good")
        for index, content in enumerate(bad["jpg"]):
            add(archive, f"bad{index}.jpg", content)
            add(archive, f"bad{index}.txt", b"bad image")
        for index, content in enumerate(bad["txt"]):
            add(archive, f"worse{index}.jpg", photo(index))
            add(archive, f"worse{index}.txt", content)
        add(archive, "link.jpg", b"", tarfile.SYMTYPE)
    prepared = call(tmp_path / "a.tar", tmp_path / "out")
    assert [example.image for example in examples(prepared)] == [photo(index) for index in range(8)]
    report = report_of(tmp_path / "out")
    assert report["left_out"] == {"image": 5, "caption": 2}
    assert [item["reason"] for item in report["damaged_files"]] == ["link"]
    assert {item["key"] for item in report["shown"]} == {*(f"bad{k}" for k in range(5)), "worse1", ""}
    assert "worse0" in next(item["message"] for item in report["shown"] if not item["key"])  # whose caption is no text
    page = (tmp_path / "out/a/1.0.0/report.html").read_text()
    assert "<html>not" not in page and page.count("no picture") == 6


def test_text_that_is_no_text(tmp_path):
    document = json.dumps({"alt": "half a pair: \ud800"}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "1.jpg", photo(1))
        add(archive, "1.json", b'{"alt": "fine"}')
        add(archive, "2.jpg", photo(2))
        add(archive, "2.json", document)
        add(archive, "caf\udce9.jpg", photo(3))
        add(archive, "caf\udce9.json", b'{"alt": "a strange key"}')
    prepared = call(tmp_path / "a.tar", tmp_path / "out", "--source.caption_field=alt")
    assert [example.captions for example in examples(prepared)] == [("fine",), ("a strange key",)]
    assert report_of(tmp_path / "out")["left_out"] == {"caption": 1}
    assert tfds.data_source("a", split="train", data_dir=tmp_path / "out")[1]["key"] == rb"caf\udce9"


def test_too_much_damage_stops_and_may_be_allowed(tmp_path):
    images = {f"{k:02}.jpg": (photo(k) if k % 2 else b"broken", "words") for k in range(30)}
    folder = write_folder(tmp_path / "photos", images)
    with pytest.raises(
        UserError, match=r"samples are damaged so far, more than max_damaged=0.01 of 30, as in .*00.jpg"
    ):
        call(folder, tmp_path / "out", "--samples_per_shard=25")
    assert os.listdir(tmp_path / "out/photos") == ["incomplete.1.0.0"]
    assert len(call(folder, tmp_path / "out", "--samples_per_shard=25", "--max_damaged=0.6")) == 15


OPTIONS = ("--samples_per_shard=4", "--dedup=perceptual", "--max_side=25", "--name=mine")

KILLED = """
import os, signal, sys
from clip_jax.data import prepare
from clip_jax.data.access import Access
from clip_jax.data.preparation import ranges

original, calls = ranges.prepare, []

def dying(*arguments):
    calls.append(None)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

ranges.prepare = dying
prepare.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    call(sources / "photos", folder, *OPTIONS)
    return contents(folder)


def test_a_killed_preparation_goes_on_and_ends_with_the_same_files(sources, tmp_path, undisturbed, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(sources / "photos"), str(tmp_path), *OPTIONS, "--processes=1"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    shards = tmp_path / "mine/incomplete.1.0.0/shards"
    times = {path: path.stat().st_mtime_ns for path in shards.glob("*.array_record")}
    assert len(times) == 2 and len(list(shards.glob("*.part"))) == 1
    with pytest.raises(UserError, match="prepared otherwise: max_side 25, now 0; remove it, or"):
        call(sources / "photos", tmp_path, *OPTIONS, "--max_side=0")
    with pytest.raises(UserError, match=r"prepared otherwise: source 'folder', now 'tar', .*source.path"):
        call(f"{sources}/*.tar", tmp_path, *OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(run, "total", None)
        call(sources / "photos", tmp_path, *OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(shards.iterdir())) == 2 * 6  # nothing half-written is left
    call(sources / "photos", tmp_path, *OPTIONS)
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "where", [(ranges, "image_hash"), (run, "decide_duplicates"), (os, "replace"), (run, "assemble")]
)
def test_an_interrupted_preparation_goes_on(sources, tmp_path, undisturbed, monkeypatch, where):
    original, calls = getattr(*where), []

    def interrupted(*arguments, **more):
        calls.append(None)
        if len(calls) == (10 if where[1] != "assemble" and where[1] != "decide_duplicates" else 1):
            raise KeyboardInterrupt
        return original(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, interrupted)
        call(sources / "photos", tmp_path, *OPTIONS)
    call(sources / "photos", tmp_path, *OPTIONS)
    assert contents(tmp_path) == undisturbed


def test_processes_make_the_same_files(sources, tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):  # hashes are made here, shards by processes
        patch.setattr(run, "decide_duplicates", None)
        call(sources / "photos", tmp_path, *OPTIONS)
    call(sources / "photos", tmp_path, *OPTIONS, processes=2)
    assert contents(tmp_path) == undisturbed


def test_beam_makes_the_same_files(sources, tmp_path, undisturbed):
    pytest.importorskip("apache_beam", reason="Apache Beam is an optional requirement: pip install 'apache-beam>=2.70'")
    call(sources / "photos", tmp_path, *OPTIONS, "--beam=--runner=DirectRunner")
    assert contents(tmp_path) == undisturbed


def test_what_is_finished_is_not_done_again(sources, tmp_path, monkeypatch):
    call(sources / "photos", tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(ranges, "prepare", None)
    assert len(call(sources / "photos", tmp_path)) == COUNT
    with pytest.raises(UserError, match=r"photos/1.0.0 was prepared otherwise: quality 0, now 80"):
        call(sources / "photos", tmp_path, "--quality=80")
    assert contents(tmp_path) == before


def test_nothing_is_left_behind_where_nothing_is_kept(sources, tmp_path):
    with pytest.raises(UserError, match="none of the 23 samples is left: 23 small"):
        call(sources / "photos", tmp_path, "--min_side=1000")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named(sources, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*00000.array_record.*: .*File too large"):
            call(sources / "photos", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(call(sources / "photos", tmp_path)) == COUNT


def test_a_disk_that_gets_full_at_the_end_is_named(sources, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*dataset: No space left"):
        patch.setattr(run, "assemble", full)
        call(sources / "photos", tmp_path)
    assert len(call(sources / "photos", tmp_path)) == COUNT


def test_two_do_not_prepare_the_same_at_a_time(sources, tmp_path, monkeypatch):
    def second(*arguments):
        call(sources / "photos", tmp_path)

    monkeypatch.setattr(ranges, "prepare", second)
    with pytest.raises(UserError, match=r"another process prepares .*incomplete"):
        call(sources / "photos", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{tmp}/nowhere", "{tmp}/out"), "nowhere does not exist or does not show its kind; expected KIND:PATH"),
        (("folder:{tmp}/nowhere", "{tmp}/out"), "nowhere is not a folder"),
        (("tar:{photos}/*.tar", "{tmp}/out"), "no file matches"),
        (("{photos}", "{photos}"), "lies in the source .*photos: name another DST"),
        (("{photos}", "{photos}/prepared"), "lies in the source"),
        (("{photos}", "{tmp}/file"), "file/photos: Not a directory"),
        (("{photos}", "{tmp}/other"), "other/photos holds something else, such as holiday.jpg"),
        (("{photos}", "{tmp}/taken"), "1.0.0 is not from clip_jax.data.prepare"),
        (("{photos}", "gs://bucket/x"), "DST must be a folder that this machine sees"),
        (("{photos}", "{tmp}/out", "--name=mnist"), "TFDS has a data set mnist of its own"),
        (("{photos}", "{tmp}/out", "--name=My Photos"), "--name must be of small letters"),
        (("{photos}", "{tmp}/out", "--source.captoin=x"), "source folder has no field 'captoin'"),
        (("{photos}", "{tmp}/out", "--quality=101"), "quality must be between 1 and 100"),
        (("{photos}", "{tmp}/out", "--dedup=same"), "dedup must be none, exact or perceptual, got 'same'"),
        (("{photos}", "{tmp}/out", "--max_side=20", "--min_side=30"), "min_side must not be above max_side"),
        (("{photos}", "{tmp}/out", "--processes=0"), "--processes must be at least 1"),
    ],
)
def test_mistakes_are_named(sources, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    for name in ("other/photos/holiday.jpg", "taken/photos/1.0.0/dataset_info.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    places = {"tmp": tmp_path, "photos": sources / "photos"}
    with pytest.raises(UserError, match=message):
        prepare.main(["--processes=1", *(argument.format(**places) for argument in arguments)])
    assert not (sources / "photos/prepared").exists() and not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "clip_jax.data.prepare", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tar:a/b-C/{{00..99}}.tar", "b_c"),
        ("tar:a/all.tar.gz", "all"),
        ("tar:gs://bucket/cc3m/*.tar", "cc3m"),
        ("folder:2024 photos/", "data_2024_photos"),
        ("tfds:coco_captions/2017:1.1.0", "my_coco_captions"),
        ("digits", "my_digits"),
    ],
)
def test_names(source, name):
    kind, config = prepare.parse_source(source, {})
    assert prepare.default_name(kind, config) == name
