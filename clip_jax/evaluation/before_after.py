"""A model before and after its fine-tuning, on what the run held out and on data sets that it should still know.

Four ways to use the same images are compared: the model that training started from, zero-shot; a linear probe of its
features, which takes seconds; what came of training; and the mean of both models' weights, WiSE-FT (arXiv 2109.01903).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.head import TASK
from clip_jax.evaluation.judge import Judged, judge, key_of, main_metric
from clip_jax.evaluation.linear_probe import LinearProbeResult, linear_probe
from clip_jax.evaluation.rows import MISSING, Row, aligned, row_of, shown
from clip_jax.evaluation.wise_ft import interpolate
from clip_jax.workdir import EVAL

logger = logging.getLogger(__name__)

HALF = 0.5
MODELS = (
    "before, zero-shot",
    "before, linear probe",
    "fine-tuned",
    "fine-tuned, average of its weights",
    f"WiSE-FT, alpha {HALF:g}",
)
BY_HEAD = "before, by its head"


@dataclass(frozen=True)
class Outcome:
    """What four models achieve.

    Attributes:
      before: of each data set, the result of the model that training started from.
      probes: of each data set, that of a linear probe of it; None where it has no classes, or is a reference.
      after: of each data set, the result of the model that training made.
      averaged: of each data set, that of the moving average of its weights; empty where there is none.
      wise_ft: of each data set, that of the mean of both.
      held_out: how many of the data sets, the first ones, are parts of what was trained on.
      scales: what the cosines of the models before and after are multiplied by.
    """

    before: Sequence[Judged]
    probes: Sequence[LinearProbeResult | None]
    after: Sequence[Judged]
    averaged: Sequence[Judged]
    wise_ft: Sequence[Judged]
    held_out: int
    scales: tuple[float, float]

    def models(self) -> dict[str, Sequence[Judged | LinearProbeResult | None]]:
        """The results of each model by its name."""
        results = (self.before, self.probes, self.after, self.averaged, self.wise_ft)
        first = BY_HEAD if self.before[0].task == TASK else MODELS[0]
        return {model: own for model, own in zip((first, *MODELS[1:]), results, strict=True) if any(own)}

    def rows(self) -> list[Row]:
        """As `evaluate.py --output` writes them."""
        return [row_of(result, model, "") for model, own in self.models().items() for result in own if result]


def compare(
    encoders: Encoders,
    start: Variables,
    end: Variables,
    averaged: Variables | None,
    held_out: Sequence[EvaluationSet],
    references: Sequence[EvaluationSet],
) -> Outcome:
    """Judge the model before and after, and half way between.

    Args:
      encoders: of all of them.
      start: the weights that training started from.
      end: those that it made.
      averaged: their moving average, if the run kept one.
      held_out: of what was trained on; linear probes are fitted to the images that training saw.
      references: what the model should still know.
    """
    datasets = [*held_out, *references]
    before, after, of_average, wise_ft = (
        [judge(encoders, variables, dataset) for dataset in datasets] if variables is not None else []
        for variables in (start, end, averaged, interpolate(start, end, HALF))
    )
    probes = [*(_probe(encoders, start, dataset) for dataset in held_out), *[None] * len(references)]
    scales = tuple(float(np.exp(np.asarray(variables["params"]["logit_scale"]))) for variables in (start, end))
    return Outcome(before, probes, after, of_average, wise_ft, len(held_out), scales)


def cells(outcome: Outcome) -> list[list[str]]:
    """A line for each model, a column for each data set, under their names."""
    lines = [["", *(key_of(result).removeprefix(EVAL) for result in outcome.before)]]
    for model, results in outcome.models().items():
        values = [MISSING if one is None else shown(main_metric(one), one.metrics[main_metric(one)]) for one in results]
        lines.append([model, *values])
    return lines


def table(outcome: Outcome) -> str:
    """The same for a terminal."""
    return aligned(cells(outcome), texts=1)


def _probe(encoders: Encoders, variables: Variables, dataset: EvaluationSet) -> LinearProbeResult | None:
    if not dataset.class_names:
        return None
    try:
        return linear_probe(encoders, variables, dataset, progress=False)
    except UserError as error:  # a class of few images; the others are not worth less for it
        logger.warning("no linear probe: %s", error)
        return None
