"""Folders: captions beside the images, or class folders with captions by templates."""

import logging
import os
import random

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import checked
from clip_jax.data.damage import Damaged
from clip_jax.data.folder import LabelledFolder
from clip_jax.data.sources import make_sources
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image


def solid(value, size=(6, 5)):
    return Image.new("RGB", size, (value, value, value))


def write(path, value=0, captions=None):
    """An image, and a file with its captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    solid(value).save(path)
    if captions is not None:
        path.with_suffix(".txt").write_text(captions, encoding="utf-8")


def open_folder(path, **fields):
    (source,), _ = make_sources({"folder": {"path": str(path), **fields}})
    return source


def examples(source):
    return [source[index] for index in range(len(source))]


def test_captions_lie_beside_the_images_at_any_depth(tmp_path):
    for name, captions in (("b.png", "two\n\n zwei \n"), ("more/a.JPG", "one"), ("c.webp", "three")):
        write(tmp_path / name, 50, captions)
    source = open_folder(tmp_path)
    assert [example.captions for example in examples(source)] == [("two", "zwei"), ("three",), ("one",)]
    assert source[2].key == str(tmp_path / "more" / "a.JPG")
    assert open_image(source[0].image).size == (6, 5)
    assert source.damage == ()


def test_the_order_is_that_of_paths_whatever_the_file_system_says(tmp_path):
    names = ["a b/x.png", "a/b.png", "a.png", "a/b/c.png", "a-b.png", "z/9.png", "z/10.png", "Z.png"]
    random.Random(0).shuffle(names)
    for name in names:
        write(tmp_path / name, captions="x")
    found = [os.path.relpath(example.key, tmp_path) for example in examples(open_folder(tmp_path))]
    assert found == sorted(names, key=lambda name: name.split("/"))


def test_class_folders(tmp_path):
    for value, name in enumerate(("tabby_cat/1.png", "dog/x/2.png", "dog/3.png")):
        write(tmp_path / name, value)
    write(tmp_path / "stray.png", 9)
    (tmp_path / "empty").mkdir()
    source = LabelledFolder(str(tmp_path))
    assert source.class_names == ("dog", "tabby cat")
    assert [example.captions for example in examples(source)] == [()] * 3
    shades = [(e.label, np.asarray(open_image(e.image))[0, 0, 0]) for e in examples(source)]
    assert sorted(shades) == [(0, 1), (0, 2), (1, 0)]


def test_templates_make_captions_of_class_folders(tmp_path, caplog):
    write(tmp_path / "tabby_cat/1.png", captions="a text that templates set aside")
    write(tmp_path / "{0.__class__}/2.png")
    source = open_folder(tmp_path, templates=("a photo of a {}.", "{}, {}!"))
    assert source.class_names == ("tabby cat", "{0.  class  }")
    assert source[0].captions == ("a photo of a tabby cat.", "tabby cat, tabby cat!")
    assert (source[0].label, source[1].captions[0]) == (0, "a photo of a {0.  class  }.")
    write(tmp_path / "stray.png")
    assert len(open_folder(tmp_path, templates=("{}",))) == 2
    assert "1 images lie in no class sub-folder" in caplog.text


def test_class_folders_without_templates_are_recognised_and_said(tmp_path, caplog):
    write(tmp_path / "cats/1.png")
    with pytest.raises(UserError, match=r"1 of 1 images have no caption file"):  # one folder is no choice of classes
        open_folder(tmp_path)
    write(tmp_path / "dogs/1.png")
    with caplog.at_level(logging.INFO, "clip_jax"):
        source = open_folder(tmp_path)
    assert [example.captions for example in examples(source)] == [("a photo of a cats.",), ("a photo of a dogs.",)]
    assert len(caplog.messages) == 1 and "its 2 sub-folders are taken for classes" in caplog.text
    write(tmp_path / "top.png")  # now they may be any sub-folders
    with pytest.raises(UserError, match=r"3 of 3 images have no caption file"):
        open_folder(tmp_path)


def test_one_caption_file_makes_it_a_folder_of_captions(tmp_path):
    for name in ("cats/1.png", "dogs/1.png"):
        write(tmp_path / name)
    (tmp_path / "cats/1.txt").write_text("a cat")
    source = open_folder(tmp_path)
    (damage,) = source.damage
    assert isinstance(damage, Damaged) and damage.reason == "caption"
    assert str(damage).startswith("1 of 2 images have no caption file: ") and "needs 1.txt beside it" in str(damage)
    assert source[0].captions == ("a cat",)
    with pytest.raises(Damaged, match=r"dogs/1\.png needs 1\.txt beside it") as error:
        source[1]
    assert error.value.reason == "caption"


def test_what_other_systems_leave_behind_stops_no_run(tmp_path):
    photos = tmp_path / "photos"
    (photos / "x.jpg").mkdir(parents=True)
    (photos / ".cache").mkdir()
    write(photos / "a.JPG", 7)
    (photos / "a.TXT").write_text("seven")
    (photos / "._a.JPG").write_bytes(b"\x00\x05\x16\x07")  # the resource fork that macOS adds
    write(photos / ".cache" / "thumbnail.png")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    (photos / "loop").symlink_to(photos)
    os.mkfifo(photos / "pipe.png")
    source = open_folder(photos)
    assert [example.captions for example in examples(source)] == [("seven",)]
    labelled = LabelledFolder(str(tmp_path))
    assert labelled.class_names == ("photos",)
    assert [open_image(example.image).size for example in examples(labelled)] == [(6, 5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", r"a\.txt is empty: expected at least one line"),
        (b"", r"a\.txt is empty"),
        (b"caf\xe9", r"a\.txt: the caption is not UTF-8 text \(byte 3\)"),
        (b"\xff\xfeg\x00", r"a\.txt: the caption is not UTF-8"),
    ],
)
def test_a_damaged_caption_is_named(tmp_path, content, message):
    write(tmp_path / "b.png", captions="good")
    write(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    source = open_folder(tmp_path)
    with pytest.raises(Damaged, match=message) as error:
        source[0]
    assert error.value.reason == "caption"


def test_files_that_vanish_or_grow_after_opening_are_damage(tmp_path, monkeypatch):
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.png", captions="good")
    source = open_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.txt").unlink()
    with (tmp_path / "c.png").open("ab") as file:
        file.truncate(checked.MAX_BYTES + 1)  # sparse: it takes no room
    (tmp_path / "d.png").unlink()
    os.mkfifo(tmp_path / "d.png")
    monkeypatch.setattr(
        checked.files, "read", lambda path: (tmp_path / path).read_bytes() if "c.png" not in path else 1 / 0
    )
    reasons = []
    for index in range(4):
        with pytest.raises(Damaged) as error:
            source[index]
        reasons.append(error.value.reason)
    assert reasons == ["image", "caption", "too_large", "image"]


def test_class_folders_that_are_links_are_said_to_be_left_out_and_no_two_have_one_name(tmp_path, caplog):
    write(tmp_path / "photos" / "dark cups" / "a.png")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "photos" / "dark cups")
    assert LabelledFolder(str(tmp_path / "photos")).class_names == ("dark cups",)
    assert "photos/linked is a link to a folder and left out" in caplog.text
    write(tmp_path / "photos" / "dark_cups" / "b.png")
    with pytest.raises(UserError, match="has two folders for the class 'dark cups', one with underscores: rename"):
        LabelledFolder(str(tmp_path / "photos"))


def test_mistakes_are_named(tmp_path):
    for opened in (open_folder, LabelledFolder):
        with pytest.raises(UserError, match="none is not a folder"):
            opened(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no image"):
        open_folder(tmp_path)
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"1 of 1 images have no caption file: .*a.png needs a.txt"):
        open_folder(tmp_path)
    for opened in (LabelledFolder, lambda path: open_folder(path, templates=("a {}",))):
        with pytest.raises(UserError, match="no class sub-folders"):
            opened(str(tmp_path))
    with pytest.raises(UserError, match=r"template 'a photo' has no \{\} where"):
        open_folder(tmp_path, templates=("a photo",))
