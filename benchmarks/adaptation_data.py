"""The data of `benchmarks.adaptation`: old and new digits as folders of images to train on and as sets to judge by."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.data.digits import CLASS_NAMES, Digits
from clip_jax.data.example import Example
from clip_jax.evaluation.datasets import EvaluationSet, evaluation_set
from clip_jax.evaluation.linear_probe import rank_in_class
from clip_jax.evaluation.registry import EVALUATION_SETS

OLD, NEW = range(5), range(5, 10)
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
    class_names: tuple[str, ...] = CLASS_NAMES

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def write(self, folder: Path) -> None:
        """Write class folders of images, unless they are there."""
        for number, example in enumerate(self.examples):
            file = folder / CLASS_NAMES[example.label] / f"{number:04}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                example.image.save(file)


def old_digits() -> Pictures:
    """What a model is pre-trained on, beside shapes: the training split of the old digits."""
    return _pictures("old digits", Digits("train"), OLD)


def new_digits(seed: int) -> EvaluationSet:
    """What it is adapted to: of each new digit `SHOTS` images to learn from, and all others to judge by."""
    drawn, left = _draw(seed)
    test = _pictures("new digits", Digits("test"), NEW).examples
    pictures = Pictures("new digits", test + left.examples)
    return EvaluationSet("new digits", pictures, CLASS_NAMES, TEMPLATES, train=lambda: drawn)


def all_digits(seed: int) -> EvaluationSet:
    """The old digits of the test split, and the new ones to judge by."""
    old = _pictures("old digits", Digits("test"), OLD).examples
    return EvaluationSet("digits", Pictures("digits", old + new_digits(seed).source.examples), CLASS_NAMES, TEMPLATES)


def shapes() -> EvaluationSet:
    """Pairs of a colour and a shape that were never trained on, among all 64."""
    return evaluation_set("shapes")


def _draw(seed: int) -> tuple[Pictures, Pictures]:
    """(images drawn, all others) of the new digits of the training split."""
    pool = _pictures("new digits", Digits("train"), NEW).examples
    drawn = rank_in_class(np.array([example.label for example in pool]), seed) < SHOTS
    return tuple(
        Pictures(name, tuple(example for example, taken in zip(pool, chosen, strict=True) if taken))
        for name, chosen in (("new digits", drawn), ("new digits left", ~drawn))
    )


def _pictures(name: str, source: Digits, labels: range) -> Pictures:
    examples = (source[index] for index in range(len(source)))
    return Pictures(name, tuple(example for example in examples if example.label in labels))


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
