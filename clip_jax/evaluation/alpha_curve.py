"""Accuracy between two models: of a target and of references, for alpha from 0 to 1 (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.judge import Judged, judge, main_metric
from clip_jax.evaluation.rows import Row, aligned, row_of, shown
from clip_jax.evaluation.wise_ft import interpolate

ALPHAS = tuple(number / 10 for number in range(11))
MEAN = "mean of the others"


@dataclass(frozen=True)
class AlphaCurve:
    """What the models between two others achieve.

    Attributes:
      alphas: ascending.
      results: of each alpha, of each data set; the first one is the target, the others are references.
    """

    alphas: tuple[float, ...]
    results: tuple[tuple[Judged, ...], ...]

    @property
    def names(self) -> list[str]:
        """The data sets with the metric that each is judged by."""
        return [f"{result.dataset.name} {main_metric(result)}" for result in self.results[0]]

    @property
    def values(self) -> Float[np.ndarray, "alphas datasets"]:
        """The metrics that the data sets are judged by."""
        return np.array([[result.metrics[main_metric(result)] for result in own] for own in self.results])

    def rows(self) -> list[Row]:
        """As `evaluate.py --output` writes them."""
        pairs = zip(self.alphas, self.results, strict=True)
        return [row_of(result, f"alpha {alpha:g}", "") for alpha, own in pairs for result in own]


def alpha_curve(
    encoders: Encoders, a: Variables, b: Variables, datasets: Sequence[EvaluationSet], progress: bool = True
) -> AlphaCurve:
    """Judge (1 - alpha) * a + alpha * b for each of `ALPHAS`.

    Args:
      encoders: of both models.
      a: weights of the one.
      b: weights of the other.
      datasets: the target, then references.
      progress: show a bar.
    """
    results = []
    for alpha in tqdm(ALPHAS, desc="alpha", unit="model", disable=not progress):
        variables = interpolate(a, b, alpha)
        results.append(tuple(judge(encoders, variables, dataset) for dataset in datasets))
    return AlphaCurve(ALPHAS, tuple(results))


def cells(curve: AlphaCurve) -> list[list[str]]:
    """A line for each alpha, a column for each data set, and one for the mean of several references."""
    values = curve.values
    several = values.shape[1] > 2
    lines = [["alpha", *curve.names, *[MEAN] * several]]
    for alpha, own in zip(curve.alphas, values, strict=True):
        shown_values = [shown("", value) for value in (*own, *([own[1:].mean()] if several else []))]
        lines.append([f"{alpha:g}", *shown_values])
    return lines


def table(curve: AlphaCurve) -> str:
    """The same for a terminal."""
    return aligned(cells(curve), texts=0)
