"""Tables: Parquet and CSV files whose rows are examples."""

import contextlib
import io
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_jax.data import checked, parquet
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.sources import make_sources
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image


def png(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def open_table(kind, path, **fields):
    (source,), _ = make_sources({kind: {"path": str(path), **fields}})
    return source


def reason(source, index):
    """Why an example cannot be read, and what the message says."""
    with pytest.raises(Damaged) as error, naming(source.where(index)):
        source[index]
    return error.value.reason, str(error.value)


def photos(count):
    return {"image": [png(k) for k in range(count)], "caption": [f"photo {k}: ä" for k in range(count)]}


def test_parquet_bytes_and_captions_in_any_order_of_reading(tmp_path):
    columns = photos(50)
    for number, (start, end) in enumerate(((0, 7), (7, 7), (7, 30), (30, 50))):
        part = {
            name: pa.array(values[start:end], pa.binary() if name == "image" else None)
            for name, values in columns.items()
        }
        if start == end:
            part["caption"] = pa.array([], pa.string())
        write(tmp_path / f"{number}.parquet", part, row_group_size=4)
    source = open_table("parquet", tmp_path / "{0..3}.parquet")
    assert (len(source), source.damage) == (50, ())
    order = random.Random(0).sample(range(50), 50)
    for index in order:
        example = source[index]
        assert (example.image, example.captions) == (columns["image"][index], (columns["caption"][index],))
    assert source[7].key == f"{tmp_path}/2.parquet, row 0" and source[49].key == f"{tmp_path}/3.parquet, row 19"
    assert open_image(source[0].image).size == (6, 5)


def test_only_the_wanted_columns_are_read(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", photos(4) | {"other": ["x" * 1000] * 4})
    read, asked = pq.ParquetFile.iter_batches, []
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *args, columns, **rest: asked.append(columns) or read(*args, columns=columns, **rest),
    )
    source = open_table("parquet", tmp_path / "a.parquet")
    assert [source[index].captions for index in range(4)] == [(f"photo {k}: ä",) for k in range(4)]
    assert asked == [["image", "caption"]]  # once, for all rows of the group


def test_hugging_face_images_and_lists_of_captions(tmp_path):
    (tmp_path / "one.png").write_bytes(png(1))
    columns = {
        "image": [
            {"bytes": png(0), "path": "zero.png"},
            {"bytes": None, "path": "one.png"},
            None,
            {"bytes": b"", "path": None},
        ],
        "TEXT": [["a", " ", None, "b "], ["c"], ["d"], ["e"]],
        "label": [1, 0, None, 5],
    }
    source = open_table("parquet", write(tmp_path / "a.parquet", columns), label_column="label")
    assert [(source[k].image, source[k].captions, source[k].label) for k in (0, 1)] == [
        (png(0), ("a", "b"), 1),
        (png(1), ("c",), 0),
    ]
    assert source.class_names == ()
    assert [reason(source, index)[0] for index in (2, 3)] == ["image", "image"]


def test_labels_of_text_are_classes(tmp_path):
    columns = photos(4) | {"kind": ["dog", "cat", None, "dog"]}
    for kind, path in (("parquet", tmp_path / "a.parquet"), ("csv", tmp_path / "a.csv")):
        write(path, columns)
        if kind == "csv":
            (tmp_path / "0.png").write_bytes(png())
            path.write_text("path,caption,kind\n" + "".join(f"0.png,x,{name or ''}\n" for name in columns["kind"]))
        source = open_table(kind, path, label_column="kind")
        assert source.class_names == ("cat", "dog")
        assert [source[index].label for index in range(4)] == [1, 0, None, 1]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_paths_are_relative_to_the_table_or_absolute_or_in_buckets(tmp_path, kind):
    import fsspec

    folder = tmp_path / "tables"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    paths = [
        "images/a.png",
        str(tmp_path / "b.png"),
        "../b.png",
        "gone.png",
        "",
        "images",
        "a\0b",
        "http://x.org/c.png",
    ]
    paths += ["s3::http://x.org/c.png", "file:///etc/hostname", "simplecache::https://x.org/c.png"]
    table = pa.table({"filepath": paths, "title": ["x"] * len(paths)})
    path = folder / f"t.{kind}"
    pq.write_table(table, path) if kind == "parquet" else pa.csv.write_csv(table, path)
    source = open_table(kind, path)
    assert [source[index].image for index in range(3)] == [png(1), png(2), png(2)]
    for index in range(3, len(paths)):
        kind_of_damage, message = reason(source, index)
        assert kind_of_damage == "image" and message.startswith(f"{path}, row ")
    assert "http://x.org/c.png is not in a bucket (gs, s3): fetch images from the web first" in reason(source, 7)[1]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/t/images/a.png", png(3))
    memory.pipe(f"/bucket/t/t.{kind}", path.read_bytes())
    source = open_table(kind, f"memory:///bucket/t/t.{kind}")
    assert (source[0].image, source[1].image) == (png(3), png(2))
    assert reason(source, 3)[0] == "image"


def test_csv_cells_may_hold_quotes_separators_and_line_breaks(tmp_path):
    for name in ("a.png", "b, c.png"):
        (tmp_path / name).write_bytes(png())
    captions = ["plain", 'said ""hi"", then\nleft', "tab\there", "ä€😀", "NULL"]
    rows = "".join(
        f'{path},"{caption}",9\n' for path, caption in zip(["a.png", '"b, c.png"'] * 3, captions, strict=False)
    )
    for text in (rows, rows.replace("\n", "\r\n"), rows.rstrip("\n")):
        (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" * (text is rows) + f"Path,Caption,extra\n{text}".encode())
        source = open_table("csv", tmp_path / "t.csv")
        expected = [caption.replace('""', '"') for caption in captions]
        assert [source[index].captions[0].replace("\r\n", "\n") for index in range(5)] == expected
        assert source.damage == ()
    for name, text in (("t.tsv", "path\ttitle, or so\na.png\ta, b\n"), ("u.csv", "filepath\ttitle\na.png\ta, b\n")):
        (tmp_path / name).write_text(text)
        fields = {"caption_column": "title, or so"} if name == "t.tsv" else {}
        assert open_table("csv", tmp_path / name, **fields)[0].captions == ("a, b",)


def test_damaged_csv_rows_are_named_and_the_others_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        b"path,caption",
        b"a.png,one",
        b"a.png",
        b"a.png,two,extra",
        b'a.png,"th\nree"',
        b"a.png,caf\xe9",
        b"a.png,",
        b"a.png,six",
    ]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "u.csv").write_bytes(b"")
    (tmp_path / "v.csv").write_bytes(b"path,words\na.png,x\n")
    (tmp_path / "w.csv").write_bytes(b'path,caption\na.png,good\na.png,"open\na.png,swallowed\n')
    source = open_table("csv", tmp_path / "[tuvw].csv")
    assert [str(item) for item in source.damage] == [
        f"{tmp_path}/t.csv, row 3: expected 2 cells, got 1",
        f"{tmp_path}/t.csv, row 4: expected 2 cells, got 3",
        f"{tmp_path}/u.csv: it has no header with the names of columns: Empty CSV file",
        f"{tmp_path}/v.csv: it has no column 'caption', which the first file has",
        f"{tmp_path}/w.csv: row 3: a quote opens and is never closed",
    ]
    assert len(source) == 5
    assert [source[index].captions for index in (0, 1, 4)] == [("one",), ("th\nree",), ("six",)]
    assert [source[index].key[-6:] for index in (0, 1, 4)] == [", row 2"[1:], ", row 5"[1:], ", row 8"[1:]]
    assert reason(source, 2) == ("caption", f"{tmp_path}/t.csv, row 6: caption is not UTF-8 text (byte 3)")
    assert reason(source, 3) == ("caption", f"{tmp_path}/t.csv, row 7: the caption, caption, is empty")


def test_damaged_cells_are_named(tmp_path):
    not_text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    captions = pa.concat_arrays([not_text, pa.array([None, "", "  ", "good", "good"])])
    images = [png(), png(), png(), png(), None, b""]
    path = write(tmp_path / "a.parquet", {"image": images, "caption": captions})
    damage = [reason(make_table(path), index) for index in range(6)]
    assert [kind for kind, _ in damage] == ["caption"] * 4 + ["image"] * 2
    assert damage[0][1] == f"{path}, row 0: caption is not UTF-8 text (byte 3)"
    other = {"image": pa.array([3]), "caption": ["x"]}
    assert reason(make_table(write(tmp_path / "b.parquet", other)), 0)[1].endswith(
        "expected bytes or a path in image, got 3"
    )
    other = {"image": [png()], "caption": pa.array([{"en": "x"}])}
    assert reason(make_table(write(tmp_path / "c.parquet", other)), 0)[0] == "caption"


def make_table(path):
    """A table whose first row may be damaged."""
    from clip_jax.data.tables import Columns, open_parquet

    return open_parquet(str(path), Columns(), window=4, lanes=8)


def test_damaged_parquet_files_are_listed_and_the_others_read(tmp_path):
    content = write(tmp_path / "good.parquet", photos(10)).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    zeroed = content[:footer] + bytes(30) + content[footer + 30 :]
    contents = {
        "a_empty": (b"", "cut"),
        "b_cut": (content[:-100], "cut"),
        "c_short": (content[:6], "cut"),
        "d_html": (b"<html>" + content, "header"),
        "e_footer": (zeroed, "header"),
        "f_length": (content[:-8] + b"\xff\xff\xff\x7fPAR1", "header"),
    }
    for name, (damaged, _) in contents.items():
        (tmp_path / f"{name}.parquet").write_bytes(damaged)
    write(tmp_path / "h_columns.parquet", {"image": [png()], "words": ["x"]})
    source = open_table("parquet", tmp_path / "*.parquet")
    assert len(source) == 10 and source[9].captions == ("photo 9: ä",)
    assert [item.reason for item in source.damage] == [kind for _, kind in contents.values()] + ["unreadable"]
    assert [str(item).partition(".parquet")[0].rpartition("/")[2] for item in source.damage] == [*contents, "h_columns"]
    with pytest.raises(Damaged, match=r"b_cut\.parquet: it ends after \d+ bytes without a footer"):
        open_table("parquet", tmp_path / "b_cut.parquet")


def test_no_flipped_byte_does_more_than_damage(tmp_path):
    content = write(tmp_path / "good.parquet", photos(6), row_group_size=3, write_page_checksum=True).read_bytes()
    good = make_table(tmp_path / "good.parquet")
    examples = [good[index] for index in range(6)]
    generator, refused = random.Random(0), 0
    for number in range(200):
        damaged = bytearray(content)
        place = generator.randrange(4, len(content) - 4)
        damaged[place] ^= 1 << generator.randrange(8)
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(damaged)
        try:
            source = make_table(path)
        except UserError:
            refused += 1
            continue
        for index in range(min(6, len(source))):
            with contextlib.suppress(Damaged):
                assert source[index].captions == examples[index].captions or place > len(content) - 2000
    assert refused > 5


def test_a_row_group_is_decoded_once_for_all_threads(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", photos(40), row_group_size=10)
    source = make_table(path)
    decode, decoded, barrier = parquet.ParquetRows._decode, [], threading.Barrier(8)
    rows = source._rows
    monkeypatch.setattr(rows._decoded, "_make", lambda group: decoded.append(group) or decode(rows, group))

    def read(seed):
        barrier.wait()
        return [(k, source[k]) for k in random.Random(seed).sample(range(40), 40)]

    with ThreadPoolExecutor(8) as pool:
        for pairs in pool.map(read, range(8)):
            assert all(example.captions == (f"photo {index}: ä",) for index, example in pairs)
    assert sorted(decoded) == [0, 1, 2, 3]


def test_memory_is_bounded_whatever_a_file_holds(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", photos(40), row_group_size=10)
    monkeypatch.setattr(parquet, "CACHED", 1)
    source = make_table(path)
    for index in range(40):
        assert source[index].captions == (f"photo {index}: ä",)
        assert len(source._rows._decoded._futures) == 1  # the one in use
    monkeypatch.setattr(parquet, "MAX_GROUP", 100)
    assert reason(make_table(path), 0)[0] == "too_large"
    monkeypatch.undo()
    # A dictionary of one large value, which each row refers to: 2 GiB if each row had a copy of its own.
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([b"x" * 2**20]))
    bomb = {"image": repeated, "caption": ["good"] * 2000}
    path = write(tmp_path / "bomb.parquet", bomb, store_schema=False)
    assert os.path.getsize(path) < 2**18
    source = make_table(path)
    assert len(source[1999].image) == 2**20
    assert source._rows._decoded[0].nbytes < 2**22
    monkeypatch.setattr(checked, "MAX_BYTES", 100)
    monkeypatch.setattr("clip_jax.data.tables.MAX_BYTES", 100)
    assert reason(source, 0)[0] == "too_large"


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_source_travels_to_other_processes(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(png())
    table = pa.table({"path": ["a.png"] * 6, "caption": [f"c{k}" for k in range(6)]})
    path = tmp_path / f"a.{kind}"
    pq.write_table(table, path, row_group_size=2) if kind == "parquet" else pa.csv.write_csv(table, path)
    source = open_table(kind, path)
    before = pickle.dumps(source)
    expected = [source[index] for index in range(6)]
    after = pickle.dumps(source)
    assert [pickle.loads(after)[index] for index in range(6)] == expected
    if kind == "parquet":
        assert len(after) < len(before) + 100  # no row group goes along


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        ({"url": ["http://x"], "caption": ["x"]}, {}, "has addresses of images in its column url, not images: fetch"),
        ({"URL": ["http://x"], "TEXT": ["x"]}, {}, "in its column URL, not images.*img2dataset"),
        ({"photo": ["x"], "caption": ["x"]}, {}, "no column with images .* image_column; it has photo, caption"),
        ({"path": ["x"], "words": ["x"]}, {}, "no column with captions .* caption_column; it has path, words"),
        ({"path": ["x"], "words": ["x"]}, {"caption_column": "word"}, "no column 'word'; it has path, words"),
        ({"path": ["x"], "text": ["x"]}, {"label_column": "y"}, "no column 'y'"),
        ({"path": pa.array([], pa.string()), "text": pa.array([], pa.string())}, {}, "has no row"),
        ({"path": ["x"], "text": ["x"]}, {"column": "y"}, "has no field 'column'"),
    ],
)
def test_mistakes_are_named(tmp_path, columns, fields, message):
    table = pa.table(columns)
    write(tmp_path / "a.parquet", columns)
    pa.csv.write_csv(table, tmp_path / "a.csv")
    for kind in ("parquet", "csv"):
        with pytest.raises(UserError, match=message) as error:
            open_table(kind, tmp_path / f"a.{kind}", **fields)
        assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    for kind in ("parquet", "csv"):
        with pytest.raises(UserError, match="no file matches"):
            open_table(kind, tmp_path / "*.none")
        with pytest.raises(UserError, match="cannot be opened"):
            open_table(kind, tmp_path / "none")
        with pytest.raises(UserError, match="path is empty"):
            open_table(kind, "")
