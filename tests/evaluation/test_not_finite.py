"""Weights that are not finite: every task and the classifier from the shell refuse to judge by them."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation.classify import classify
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.tasks import TASKS
from tests.evaluation.test_classifiers import CONFIG, encoders, variables
from tests.evaluation.test_features import Pictures


class Captioned(Pictures):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), captions=(f"picture {index}",))


class Twice(Captioned):
    """Enough for a validation split."""

    def __len__(self):
        return 30


DATASET = EvaluationSet("pictures", Captioned(), ("cat", "dog", "bird"), train=Twice)
WITH_HEAD = dataclasses.replace(CONFIG, classes=DATASET.class_names)
IMAGES_ALONE = ("head", "linear_probe")


def broken(tower, value):
    params = {**variables()["params"], "classifier": np.ones((3, CONFIG.embed_dim), np.float32)}
    return {**variables(), "params": {**params, tower: jax.tree.map(lambda x: np.full_like(x, value), params[tower])}}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "task, tower",
    [(task, tower) for task in TASKS for tower in ("visual", "text") if task not in IMAGES_ALONE or tower == "visual"],
)
def test_a_task_refuses(task, tower, value):
    with pytest.raises(UserError, match="NaN or infinite"):
        TASKS[task].run(encoders(WITH_HEAD), broken(tower, value), DATASET, False)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_the_classifier_from_the_shell_refuses(tower, tmp_path):
    path = str(tmp_path / "picture.png")
    Captioned()[0].image.save(path)
    with pytest.raises(UserError, match="logits: expected finite scores"):
        classify(encoders(), broken(tower, np.nan), [path], ["a cup", "not a cup"])
    params = {**variables()["params"], "logit_scale": np.float32(1000)}
    with pytest.raises(UserError, match="logits: expected finite scores"), np.errstate(all="ignore"):
        classify(encoders(), {**variables(), "params": params}, [path], ["a cup", "not a cup"])
