"""Labels in batches: classes are told apart by their names, whatever the sources call and number them."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.damage import Damaged
from clip_jax.data.example import Example
from clip_jax.data.pipeline import InputConfig, TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.targets import Labels, classes_of
from clip_jax.errors import UserError
from clip_jax.processing import Augment, Preprocess


class Pictures:
    """Images of one grey value for each class, told by `greys`; without captions."""

    def __init__(self, name, class_names, greys, label=int):
        self.name, self.class_names, self._greys, self._label = name, class_names, greys, label

    def __len__(self):
        return len(self._greys)

    def __getitem__(self, index):
        pixels = np.full((8, 8, 3), self._greys[index], np.uint8)
        return Example(Image.fromarray(pixels), label=self._label(index))


FIRST = Pictures("first", ("black", "dark_grey"), (0, 80))
SECOND = Pictures("second", ("white", "black"), (255, 0))
GREYS = {"white": 255, "dark grey": 80, "black": 0}


@pytest.mark.parametrize("processes", [0, 2])
def test_a_batch_has_the_models_numbers_of_the_classes(processes):
    target = Labels(tuple(GREYS))
    reader = TrainReader(Mixture((FIRST, SECOND), (1.0, 1.0), 0, 16), Preprocess(8), target, Augment())
    with contextlib.closing(TrainBatches(reader, InputConfig(data_processes=processes))) as batches:
        batch = next(batches)
    assert set(batch) == {"image", "label"} and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.array(list(GREYS.values()))[batch["label"]])
    assert set(batch["label"].tolist()) == {0, 1, 2}


def test_the_classes_of_several_sources():
    assert classes_of((FIRST, SECOND)) == ("black", "dark grey", "white")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Pictures("x", (), (0,)), "has no named classes to train on"),
        (Pictures("x", ("white", "red"), (0,)), "has 1 classes that model.classes does not name, such as 'red'"),
        (Pictures("x", ("dark_grey", "dark grey"), (0,)), "two classes of the name 'dark grey'"),
        (Pictures("x", ("white",), (0,), lambda _: (0, 1)), "several classes each"),
    ],
)
def test_sources_that_do_not_suit_are_refused_at_once(source, message):
    with pytest.raises(UserError, match=message):
        Labels(tuple(GREYS)).check_source(source)


@pytest.mark.parametrize("label", [None, -1, 2, (0,)])
def test_a_label_that_is_no_class_is_damage(label):
    with pytest.raises(Damaged, match="expected the number of one of 2 classes, got"):
        Labels(tuple(GREYS)).words(FIRST, Example(b"", label=label))
