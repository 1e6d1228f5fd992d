"""Evaluation sets by name, from one registry."""

import re

import pytest
from PIL import Image

from clip_jax.data import shapes
from clip_jax.data.access import Access
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import evaluation_set
from clip_jax.evaluation.prompts import prompt


def labels_of(dataset):
    return {dataset.source[index].label for index in range(len(dataset.source))}


def test_shapes_are_the_pairs_held_out_or_those_seen(data_dir):
    for name, labels in (("shapes", shapes.HELD_OUT), ("shapes_seen", shapes.SEEN)):
        dataset = evaluation_set(name, Access(data_dir))
        assert dataset.class_names == shapes.CLASS_NAMES
        assert labels_of(dataset) == set(labels)


def test_prompts_have_the_right_article(data_dir):
    dataset = evaluation_set("shapes", Access(data_dir))
    prompts = {prompt(template, name) for template in dataset.templates for name in dataset.class_names}
    assert {"an orange circle", "a photo of an orange circle", "there is a red star"} <= prompts
    assert not [prompt for prompt in prompts if re.search(r"\ba [aeiou]|\ban? an?\b|\ban [^aeiou]", prompt)]


def test_digits():
    dataset = evaluation_set("digits")
    assert (len(dataset.source), dataset.class_names[7]) == (355, "seven")
    assert labels_of(dataset) == set(range(10))


def test_a_folder_of_class_folders(tmp_path):
    for name in ("tabby_cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 5)).save(tmp_path / name / "1.png")
    dataset = evaluation_set(str(tmp_path))
    assert (dataset.name, dataset.class_names) == (str(tmp_path), ("dog", "tabby cat"))
    assert dataset.templates == ("a photo of a {}.",)
    with pytest.raises(UserError, match="none is not a folder"):
        evaluation_set(str(tmp_path / "none"))


def test_tfds_names(photos_dir, data_dir):
    for name, size in (("tiny_photos", 4), ("tiny_photos/train", 10), ("tiny_photos:1.0.0/train", 10)):
        dataset = evaluation_set(name, Access(photos_dir))
        assert (dataset.name, dataset.class_names, len(dataset.source)) == (name, ("cat", "dog"), size)
    name = f"shapes:{shapes.Shapes.VERSION}"  # no test split, so the validation split
    assert labels_of(evaluation_set(name, Access(data_dir))) == set(shapes.SEEN)
    with pytest.raises(UserError, match="TFDS knows none of that name"):
        evaluation_set("tiny_images/test", Access(photos_dir))


def test_a_missing_tfds_set_is_fetched_by_its_own_name_only(tmp_path, monkeypatch):
    """NAME/CONFIGURATION and NAME/SPLIT are told apart; whatever fails, nothing else is fetched instead."""
    from clip_jax.data import tfds_builder
    from tests import tiny_photos  # TFDS knows them now  # noqa: F401

    asked = []
    monkeypatch.setattr(tfds_builder, "prepare", lambda builder: asked.append(builder.info.full_name) or 1 / 0)
    for name in ("tiny_configs/green", "tiny_photos/test", "tiny_photos"):
        with pytest.raises(ZeroDivisionError):
            evaluation_set(name, Access(str(tmp_path)))
        with pytest.raises(UserError, match=r"not prepared in .* --offline"):
            evaluation_set(name, Access(str(tmp_path), offline=True))
    assert asked == ["tiny_configs/green/1.0.0", "tiny_photos/1.0.0", "tiny_photos/1.0.0"]


@pytest.mark.parametrize("unknown", ["shaeps", "photos/test"])
def test_an_unknown_name_lists_what_is_accepted(unknown, tmp_path):
    with pytest.raises(UserError) as error:
        evaluation_set(unknown, Access(str(tmp_path)))
    message = str(error.value)
    assert all(name in message for name in (repr(unknown), "shapes, shapes_seen, digits", "folder", "NAME/SPLIT"))
    assert "\n" not in message
