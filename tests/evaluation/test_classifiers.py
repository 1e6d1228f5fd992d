"""Classifiers that are kept: found again where nothing changed, never stale, computed again where damaged."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation import classifiers as module
from clip_jax.evaluation.classifiers import kept_classifier, kept_zero_shot
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.tasks import TASKS
from clip_jax.evaluation.zero_shot import zero_shot, zero_shot_classifier
from clip_jax.models import CLIP, Execution
from clip_jax.parallel import MeshConfig, make_partitioner
from tests import tiny
from tests.evaluation.test_features import CONFIG, Pictures

NAMES, TEMPLATES = ("cat", "dog", "bird", "fish"), ("a {}", "the {c}.")


@functools.cache
def encoders(config=CONFIG, dtype="float32"):
    return make_encoders(CLIP(config, Execution(dtype=dtype)), make_partitioner(MeshConfig(), jax.devices()[:1]))


@functools.cache
def variables():
    return tiny.variables(CONFIG)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    return tmp_path / "classifiers"


@pytest.fixture
def made(monkeypatch):
    """Of how many class names a classifier was made."""
    counts = []

    def counting(encoders, variables, names, templates, bar):
        counts.append(len(names))
        return zero_shot_classifier(encoders, variables, names, templates, bar)

    monkeypatch.setattr(module, "zero_shot_classifier", counting)
    return counts


def test_a_classifier_is_made_once(folder, made):
    first = kept_classifier(encoders(), variables(), NAMES, TEMPLATES)
    np.testing.assert_array_equal(first, zero_shot_classifier(encoders(), variables(), NAMES, TEMPLATES))
    again = kept_classifier(encoders(), variables(), list(NAMES), list(TEMPLATES))
    np.testing.assert_array_equal(again, first)
    assert made == [4] and len(list(folder.glob("*/*.npz"))) == 1 and not list(folder.glob("*/*.part"))


CASED = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, lowercase=False))


@pytest.mark.parametrize(
    "what, change",
    [
        ("names", {"names": ("cat", "dog", "bird", "owl")}),
        ("another order", {"names": ("dog", "cat", "bird", "fish")}),
        ("templates", {"templates": ("a {}", "the {c}")}),
        ("the same prompts in other classes", {"names": ("a cat", "the cat."), "templates": ("{}",) * 4}),
        ("weights", {"variables": lambda: jax.tree.map(lambda array: array / 2, variables())}),
        ("dtype", {"encoders": lambda: encoders(dtype="bfloat16")}),
        ("architecture", {"encoders": lambda: encoders(dataclasses.replace(CONFIG, activation="gelu"))}),
        ("tokenizer", {"encoders": lambda: encoders(CASED)}),
    ],
)
def test_what_changes_the_result_finds_nothing(what, change, folder, made):
    kept_classifier(encoders(), variables(), NAMES, TEMPLATES)
    own = {"encoders": encoders, "variables": variables, "names": NAMES, "templates": TEMPLATES, **change}
    arguments = (own["encoders"](), own["variables"](), own["names"], own["templates"])
    found = kept_classifier(*arguments)
    assert len(made) == 2
    np.testing.assert_array_equal(found, zero_shot_classifier(*arguments))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "other shape", "array", "not finite"])
def test_a_damaged_or_foreign_file_is_replaced(damage, folder, made, caplog):
    first = kept_classifier(encoders(), variables(), NAMES, TEMPLATES)
    (file,) = folder.glob("*/*.npz")
    whole = file.read_bytes()
    name = str(np.load(file)["name"])
    if damage == "foreign":  # of other classes, as many
        kept_classifier(encoders(), variables(), ("owl", "cow", "bee", "ant"), TEMPLATES)
        (other,) = set(folder.glob("*/*.npz")) - {file}
        file.write_bytes(other.read_bytes())
        other.unlink()
    elif damage == "other shape":
        np.savez(file, name=np.array(name), values=first[:, :3])
    elif damage == "not finite":
        np.savez(file, name=np.array(name), values=np.full_like(first, np.nan))
    elif damage == "array":
        with file.open("wb") as stream:
            np.save(stream, first)
    else:
        middle = whole.index(first.tobytes()[:16]) + 200
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        file.write_bytes({"cut": whole[: len(whole) // 2], "flipped": flipped, "empty": b""}[damage])
    made.clear()
    np.testing.assert_array_equal(kept_classifier(encoders(), variables(), NAMES, TEMPLATES), first)
    assert made == [4] and "is damaged" in caplog.text
    np.testing.assert_array_equal(kept_classifier(encoders(), variables(), NAMES, TEMPLATES), first)
    assert made == [4]


def test_only_evaluation_keeps_classifiers(folder, made):
    """Training calls `zero_shot`: its weights are others each time."""
    dataset = EvaluationSet("pictures", Pictures(), NAMES[:3], TEMPLATES)
    expected = zero_shot(encoders(), variables(), dataset, progress=False)
    assert not folder.exists()
    assert TASKS["zeroshot"].run is kept_zero_shot
    for _ in range(2):
        np.testing.assert_array_equal(
            kept_zero_shot(encoders(), variables(), dataset, progress=False).scores, expected.scores
        )
    assert made == [3]


def test_what_is_not_finite_is_not_kept(folder):
    broken = jax.tree.map(lambda array: np.full_like(array, np.nan), variables())
    dataset = EvaluationSet("pictures", Pictures(), NAMES[:3], TEMPLATES)
    with pytest.raises(UserError, match="expected finite scores"):
        kept_zero_shot(encoders(), broken, dataset, progress=False)
    assert not folder.exists()
