"""The data of `benchmarks.adaptation`: old and new digits as folders of images to train on and as sets to judge by."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.data.digits import CLASS_NAMES, Digits
from clip_jax.data.example import Example
from clip_jax.evaluation.datasets import EvaluationSet, evaluation_set
from clip_jax.evaluation.linear_probe import rank_in_class
from clip_jax.evaluation.registry import EVALUATION_SETS

OLD, NEW = range(5), range(5, 10)
NEW_NAMES = CLASS_NAMES[NEW.start :]
SHOTS = 32  # images of a new digit to learn from
TEMPLATES = tuple(text.replace("{c}", "{}") for text in EVALUATION_SETS["digits"].templates)


@dataclass(frozen=True)
class Pictures:
    """Some of the digits, as a source.

    Attributes:
      name: what messages call it.
      examples: pictures with labels.
      class_names: of the labels.
    """

    name: str
    examples: tuple[Example, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def write(self, folder: Path) -> None:
        """Write class folders of images, unless they are there."""
        for number, example in enumerate(self.examples):
            file = folder / self.class_names[example.label] / f"{number:04}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                example.image.save(file)


def old_digits() -> Pictures:
    """What a model is pre-trained on, beside shapes: the training split of the old digits."""
    return Pictures("old digits", _examples("train", OLD), CLASS_NAMES[: NEW.start])


def new_digits(seed: int) -> EvaluationSet:
    """What it is adapted to: of each new digit `SHOTS` images to learn from, and all others to judge by."""
    learned, judged = (
        Pictures("new digits", tuple(replace(each, label=each.label - NEW.start) for each in part), NEW_NAMES)
        for part in _drawn(seed)
    )
    return EvaluationSet("new digits", judged, NEW_NAMES, TEMPLATES, train=lambda: learned)


def all_digits(seed: int) -> EvaluationSet:
    """The old digits of the test split, and the new ones to judge by."""
    pictures = Pictures("digits", _examples("test", OLD) + _drawn(seed)[1], CLASS_NAMES)
    return EvaluationSet("digits", pictures, CLASS_NAMES, TEMPLATES)


def shapes() -> EvaluationSet:
    """Pairs of a colour and a shape that were never trained on, among all 64."""
    return evaluation_set("shapes")


def _drawn(seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The new digits: images drawn of the training split, and all others of both splits."""
    pool = _examples("train", NEW)
    drawn = rank_in_class(np.array([example.label for example in pool]), seed) < SHOTS
    learned, left = (
        tuple(example for example, taken in zip(pool, chosen, strict=True) if taken) for chosen in (drawn, ~drawn)
    )
    return learned, _examples("test", NEW) + left


def _examples(split: str, labels: range) -> tuple[Example, ...]:
    """Of the digits that `labels` are, one example after the other."""
    source = Digits(split)
    return tuple(example for example in (source[index] for index in range(len(source))) if example.label in labels)


def accuracies(scores: Float[np.ndarray, "n 10"], labels: Int[np.ndarray, "n"]) -> dict[str, float]:
    """Top-1 accuracy on new and on old digits, each among the five of their kind; the mean of both among all ten."""

    def accuracy(rows: Bool[np.ndarray, "n"], classes: range) -> float:
        return float((scores[rows][:, classes].argmax(axis=1) + classes.start == labels[rows]).mean())

    new, everything = labels >= NEW.start, range(10)
    return {
        "new": accuracy(new, NEW),
        "old": accuracy(~new, OLD),
        "all ten": (accuracy(new, everything) + accuracy(~new, everything)) / 2,
    }
