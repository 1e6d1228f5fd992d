import re
from pathlib import Path

import numpy as np
import pytest

from clip_jax.data import shapes
from clip_jax.data.access import Access
from clip_jax.data.order import sample_generator
from clip_jax.data.sources import make_sources
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image


def draw(seed, index, label):
    generator = sample_generator(seed, index)
    scene = shapes.sample_scene(label, generator)
    return scene, shapes.render(scene, generator), shapes.captions(scene, generator)


def names(words, caption):
    """The entries of `words` that a caption names, by themselves or by a synonym."""
    return [
        word
        for word in words
        if any(re.search(rf"\b{synonym}\b", caption) for synonym in shapes._SYNONYMS.get(word, (word,)))
    ]


def test_held_out_pairs_are_a_diagonal():
    pairs = [shapes.PAIRS[label] for label in shapes.HELD_OUT]
    assert sorted(colour for colour, _ in pairs) == sorted(shapes.COLOURS)
    assert sorted(shape for _, shape in pairs) == sorted(shapes.SHAPES)
    assert sorted(shapes.SEEN + shapes.HELD_OUT) == list(range(64))
    assert len(set(shapes.CLASS_NAMES)) == 64


def test_training_never_shows_nor_names_a_held_out_pair(data_dir):
    held_out = {shapes.PAIRS[label] for label in shapes.HELD_OUT}
    for split in ("train", "validation"):
        (source,), _ = make_sources({"shapes": {"split": split}}, Access(data_dir))
        labels = [source[index].label for index in range(len(source))]
        assert sorted(labels) == sorted(4 * shapes.SEEN)
        for index in range(len(source)):
            for caption in source[index].captions:
                named = {(c, s) for c in names(shapes.COLOURS, caption) for s in names(shapes.SHAPES, caption)}
                assert not named & held_out, caption
                assert named <= {shapes.PAIRS[source[index].label]}, caption


def test_each_scene_has_three_full_captions_and_three_of_its_shape():
    for label in range(64):
        colour, shape = shapes.PAIRS[label]
        texts = draw(0, label, label)[2]
        assert [names(shapes.COLOURS, text) for text in texts] == [[colour]] * 3 + [[]] * 3
        assert [names(shapes.SHAPES, text) for text in texts] == [[shape]] * 6


def test_captions_tell_the_truth_about_size_place_and_ground():
    for index in range(300):
        scene, _, texts = draw(1, index, index % 64)
        for text in texts:
            for word in names(("small", "large"), text):
                assert word == scene.size
            for word in names(("top", "bottom"), text):
                assert word == scene.row
            for word in names(("left", "right"), text):
                assert word == scene.column
            for word in names(("black", "charcoal", "gray"), text):
                assert word == scene.background


def test_articles_agree():
    texts = [text for label in range(64) for text in draw(2, label, label)[2]]
    assert not [text for text in texts if re.search(r"\ba [aeiou]|\ban [^aeiou]", text)]
    assert any(" an orange" in text for text in texts)


def test_scenes_are_pure_functions_of_seed_and_index():
    _, image, texts = draw(5, 17, 3)
    _, same_image, same_texts = draw(5, 17, 3)
    np.testing.assert_array_equal(image, same_image)
    assert texts == same_texts
    for other in (draw(5, 18, 3), draw(6, 17, 3)):
        assert (other[1] != image).any()


@pytest.mark.parametrize("label", range(64))
def test_the_picture_shows_what_its_scene_says(label):
    colour, _ = shapes.PAIRS[label]
    paints = np.array(list(shapes.COLOURS.values()))
    wrong = 0
    for index in range(5):
        scene, image, _ = draw(3, 64 * index + label, label)
        chroma = np.ptp(image.astype(int), axis=2) > 75  # the grounds are nearly grey
        rows, columns = np.nonzero(chroma)
        for position, place, choices in (
            (rows, scene.row, ("top", "middle", "bottom")),
            (columns, scene.column, ("left", "middle", "right")),
        ):
            offset = (position.min() + position.max()) / 2 - 15.5
            assert np.sign(offset) == choices.index(place) - 1 or (place == "middle" and abs(offset) < 3)
        nearest = np.abs(paints - np.median(image[chroma], axis=0)).sum(1).argmin()
        wrong += list(shapes.COLOURS)[nearest] != colour
    assert wrong == 0


def test_the_data_set_holds_the_scenes_of_its_seed(data_dir):
    (source,), _ = make_sources({"shapes": {"split": "held_out"}}, Access(data_dir))
    prepared = {
        (open_image(example.image).tobytes(), example.captions) for example in map(source.__getitem__, range(32))
    }
    scenes = [draw(20_261_121, index, shapes.HELD_OUT[index % 8]) for index in range(32)]
    assert prepared == {(image.tobytes(), texts) for _, image, texts in scenes}


def test_splits_hold_the_right_pairs(data_dir):
    for split, pairs in (("held_out", shapes.HELD_OUT), ("validation", shapes.SEEN)):
        (source,), _ = make_sources({"shapes": {"split": split}}, Access(data_dir))
        assert source.class_names == shapes.CLASS_NAMES
        assert {source[index].label for index in range(len(source))} == set(pairs)
    assert len(shapes.HELD_OUT) * shapes.SPLITS["held_out"][1] >= 800


def test_a_second_use_finds_the_data_prepared(data_dir, capsys):
    path = Path(data_dir, "shapes", str(shapes.Shapes.VERSION))
    before = path.stat()
    shapes.prepared_builder(data_dir)
    assert path.stat() == before
    assert capsys.readouterr().out == ""


def test_a_directory_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set data_dir"):
        shapes.prepared_builder(str(tmp_path / "file"))
