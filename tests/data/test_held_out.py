"""What a folder holds out: a function of names and bytes, of each class its share, and no copy on both sides."""

import dataclasses
import hashlib
import logging
import os
import shutil

import pytest

from clip_jax.data import folder
from clip_jax.data.folder import open_divided
from clip_jax.data.held_out import divide
from clip_jax.errors import UserError
from clip_jax.training.held_out import record_held_out
from tests.data.test_folder import write
from tests.training.test_run import CONFIG

TEMPLATES = ("a {}",)


@pytest.fixture
def photos(tmp_path):
    for name, count in (("tabby_cat", 10), ("0", 7), ("dog", 2)):
        for number in range(count):
            write(tmp_path / "photos" / name / f"{number}.png", number + 20 * count)
    return tmp_path / "photos"


def keys(source):
    return [os.path.basename(os.path.dirname(source[i].key)) + source[i].key[-5] for i in range(len(source))]


def test_each_class_has_its_share_on_either_side_and_all_classes_are_on_both(photos):
    train, held_out, division = open_divided(str(photos), TEMPLATES, 0.3)
    assert train.class_names == held_out.class_names == ("0", "dog", "tabby cat")
    assert held_out.templates == TEMPLATES and division.copies == 0
    assert sorted(keys(train) + keys(held_out)) == sorted(keys(folder.LabelledFolder(str(photos))))
    counts = [sum(key.startswith(name) for key in keys(held_out)) for name in ("0", "dog", "tabby_cat")]
    assert counts == [2, 1, 3]  # 2.1, 0.6, 3
    for share, expected in ((0.001, 3), (0.999, 6 + 1 + 9)):
        assert len(open_divided(str(photos), TEMPLATES, share)[1]) == expected


def test_neither_the_place_nor_the_order_of_the_listing_changes_it(photos, tmp_path, monkeypatch):
    held_out = keys(open_divided(str(photos), TEMPLATES, 0.3)[1])
    for name, images, count in (("0", 7, 2), ("dog", 2, 1), ("tabby_cat", 10, 3)):  # frozen: others have it so
        ranked = sorted(range(images), key=lambda number: hashlib.sha256(f"{name}/{number}.png".encode()).digest())
        assert {f"{name}{number}" for number in ranked[:count]} == {key for key in held_out if key[:-1] == name}
    shutil.copytree(photos, tmp_path / "moved")
    scan = folder._scan
    monkeypatch.setattr(folder, "_scan", lambda path: reversed(list(scan(path))))
    assert keys(open_divided(f"{tmp_path}/moved/", TEMPLATES, 0.3)[1]) == held_out


def test_copies_are_on_one_side_whatever_their_class_and_counted(photos, caplog):
    for number in range(6):  # names of both sides
        shutil.copy(photos / "tabby_cat" / "1.png", photos / "dog" / f"copy{number}.png")
        shutil.copy(photos / "0" / "1.png", photos / "0" / f"copy{number}.png")
    with caplog.at_level(logging.INFO, "clip_jax"):
        train, held_out, division = open_divided(str(photos), TEMPLATES, 0.3)
    images = [{source[i].image for i in range(len(source))} for source in (train, held_out)]
    assert not images[0] & images[1] and division.copies == 12
    assert "31 images of 3 classes" in caplog.text and "12 are copies of others" in caplog.text


def test_no_folder_may_train_on_what_another_one_holds_out(photos, tmp_path):
    parted = {"kind": "folder", "path": str(photos), "held_out": 0.3}
    (image, *_) = open_divided(str(photos), (), 0.3)[2].held_out
    shutil.copytree(photos, tmp_path / "copies")
    others = ({**parted, "held_out": 0.0}, {**parted, "held_out": 0.1}, {**parted, "path": str(tmp_path / "copies")})
    for number, other in enumerate(others[:2]):
        with pytest.raises(UserError, match=r"data.a holds out .*\.png, but data.b trains on it or on a copy of it"):
            record_held_out(dataclasses.replace(CONFIG, data={"a": parted, "b": other}), tmp_path / str(number))
    record_held_out(dataclasses.replace(CONFIG, data={"a": parted, "b": others[2]}), tmp_path)  # the same parts
    shutil.copy(image, tmp_path / "copies" / "dog" / "again.png")
    open_divided.cache_clear()
    with pytest.raises(UserError, match="trains on it or on a copy"):
        others = {**parted, "path": str(tmp_path / "copies"), "held_out": 0.0}
        record_held_out(dataclasses.replace(CONFIG, data={"a": parted, "b": others}), tmp_path)


def test_captioned_folders_are_divided_as_a_whole(tmp_path):
    for number in range(5):
        write(tmp_path / f"{number % 2}" / f"{number}.png", number, captions=f"number {number}")
    train, held_out, _ = open_divided(str(tmp_path), (), 0.4)
    assert (len(train), len(held_out)) == (3, 2) and not hasattr(train, "class_names")
    assert {source[i].captions for source in (train, held_out) for i in range(len(source))} == {
        (f"number {number}",) for number in range(5)
    }


def test_what_cannot_be_divided_is_one_line(photos, caplog):
    (photos / "empty").mkdir()
    with pytest.raises(UserError, match="photos/empty holds no image: add some, or remove the folder"):
        open_divided(str(photos), TEMPLATES, 0.2)
    write(photos / "empty" / "1.png")
    (photos / "empty" / "gone.jpg").symlink_to(photos / "nowhere")
    with pytest.raises(UserError, match=r"at least two different images of each class.* 'empty' of .* has 1: add"):
        open_divided(str(photos), TEMPLATES, 0.2)
    assert "gone.jpg is a broken link and left out" in caplog.text
    with pytest.raises(UserError, match=r"held_out=0.5 needs at least two .* but x has 1"):
        divide("x", {"x/vanished.png": ""}, 0.5)
