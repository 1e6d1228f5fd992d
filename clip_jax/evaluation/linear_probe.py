"""The linear probe of the paper's appendix A.3: how well a linear classifier reads the classes off the features.

A logistic regression on the training split, its regularisation chosen by accuracy on a validation split; then fitted
to both together and judged on the test split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax
from tqdm import tqdm

from clip_jax.data.example import Source
from clip_jax.distributed import together
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.features import Features, extract
from clip_jax.evaluation.logistic import LogisticRegression
from clip_jax.evaluation.metrics import accuracy, check_scores, classification_metrics
from clip_jax.parallel import Partitioner

PER_DECADE = 8
_DECADES = 6  # to either side of 1
_FIRST_STEP = 2 * PER_DECADE  # between the first values tried
_VALIDATION = 5  # one example in so many of a class, where there is no validation split


@dataclass(frozen=True)
class Splits:
    """The features of a data set.

    Attributes:
      dataset: whose.
      train: to fit to.
      validation: to choose the regularisation by.
      test: to judge on.
    """

    dataset: EvaluationSet
    train: Features
    validation: Features
    test: Features


@dataclass(frozen=True)
class LinearProbeResult:
    """Scores of every test image.

    Attributes:
      dataset: what was classified.
      scores: logits.
      labels: the true classes.
      strength: of the regularisation, the λ that was chosen.
    """

    dataset: EvaluationSet
    scores: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, "n"]
    strength: float
    task: ClassVar[str] = "linear_probe"

    def __post_init__(self):
        check_scores(self.scores, self.labels, self.dataset.name)

    @property
    def metrics(self) -> dict[str, float]:
        """As CLIP_benchmark names them, and λ."""
        metrics = classification_metrics(self.scores, self.labels, self.dataset.metric)
        return {**{f"lp_{name}": value for name, value in metrics.items()}, "lp_strength": self.strength}


def linear_probe(
    encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool = True
) -> LinearProbeResult:
    """Extract a data set's features, fit a classifier to them and judge it.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: with a training split.
      progress: show bars.

    Raises:
      UserError: see `extract_splits` and `fit_probe`.
    """
    return fit_probe(extract_splits(encoders, variables, dataset, progress), encoders.partitioner, progress)


def extract_splits(encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool = True) -> Splits:
    """The features of a data set's splits; without a validation split, a fifth of each class is taken from training.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: with a training split.
      progress: show bars.

    Raises:
      UserError: there is no training split, or too little of it for both.
    """
    if dataset.train is None:
        raise UserError(f"{dataset.name} has no training split, which a linear probe needs")
    train, validation = together(lambda: (_opened(dataset, dataset.train), _opened(dataset, dataset.validation)))
    train, validation, test = (
        source and extract(encoders, variables, source, progress) for source in (train, validation, dataset.source)
    )
    if validation is None:
        train, validation = held_out_fifth(train)
    if not len(validation):
        raise UserError(
            f"{dataset.name}: expected at least {_VALIDATION} examples of some class to train on, a fifth of which "
            f"choose the regularisation; got {len(train)} examples"
        )
    return Splits(dataset, train, validation, test)


def held_out_fifth(train: Features) -> tuple[Features, Features]:
    """Training examples without a fifth of each class, and that fifth; empty where no class has five."""
    held_out = rank_in_class(train.labels, seed=0) % _VALIDATION == _VALIDATION - 1
    return train[~held_out], train[held_out]


def _opened(dataset: EvaluationSet, split: Callable[[], Source] | None) -> Source | None:
    """Another split, whose labels must mean what those of the test split mean."""
    source = split and split()
    names = [getattr(each, "class_names", None) for each in (source, dataset.source)]
    if all(names) and names[0] != names[1]:
        odd = next(iter({*names[0]} ^ {*names[1]}), "the order")
        raise UserError(f"{source.name} has other classes than {dataset.source.name}: {odd} differs")
    return source


def fit_probe(splits: Splits, partitioner: Partitioner, progress: bool = True) -> LinearProbeResult:
    """Choose the regularisation, fit to training and validation examples, classify the test images.

    Raises:
      UserError: features that are not finite, examples without labels, or all of one class.
    """
    classes = len(splits.dataset.class_names)
    strength = choose_strength(splits.train, splits.validation, classes, partitioner, progress)
    both = splits.train + splits.validation
    classifier = LogisticRegression(both.values, both.labels, classes, partitioner).fit(strength)
    return LinearProbeResult(splits.dataset, classifier.scores(splits.test.values), splits.test.labels, strength)


def choose_strength(
    train: Features,
    validation: Features,
    classes: int,
    partitioner: Partitioner,
    progress: bool = True,
    bias: bool = True,
) -> float:
    """The regularisation with the highest accuracy on validation examples, of equals that with the lowest loss.

    Every fit begins at zero, so that it does not depend on those before it.
    """
    regression = LogisticRegression(train.values, train.labels, classes, partitioner, bias)

    def quality(strength: float) -> tuple[float, float]:
        bar.update()
        scores = regression.fit(strength).scores(validation.values)
        own = np.take_along_axis(log_softmax(scores, axis=1), validation.labels[:, None], axis=1)
        return accuracy(scores, validation.labels), float(own.mean())

    with tqdm(desc="regularisation", unit="fit", disable=not progress) as bar:
        return search(quality)


def search(quality: Callable[[float], Any]) -> float:
    """The paper's parametric binary search over 96 logarithmic steps from 1e-6 to 1e6.

    It tries every second decade, and then goes on to halve the interval around the best so far.

    Args:
      quality: of a strength, the higher the better; asked at most once for each.
    """
    last = _DECADES * PER_DECADE
    qualities, step = {}, _FIRST_STEP
    nearby = range(-last, last + 1, step)
    while step:
        qualities |= {number: quality(strength_of(number)) for number in nearby if abs(number) <= last}
        best, step = max(qualities, key=qualities.get), step // 2
        nearby = (best - step, best + step)
    return strength_of(best)


def strength_of(number: int) -> float:
    """The regularisation of a step of the search: 0 is 1, and `PER_DECADE` steps are a decade."""
    return 10 ** (number / PER_DECADE)


def rank_in_class(labels: Int[np.ndarray, "n"], seed: int) -> Int[np.ndarray, "n"]:
    """Where each example comes among those of its class, in an order that the seed decides: 0 is the first."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(first, counts)
    return ranks
