"""Which examples of a data set a page shows."""

import numpy as np
from jaxtyping import Int

from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.prompts import prompt
from clip_jax.processing.images import open_image
from clip_jax.reports.page import picture_url


def thumbnail(dataset: EvaluationSet, index: int | np.integer) -> str:
    """The picture of an example."""
    return picture_url(open_image(dataset.source[int(index)].image))


def text_of(dataset: EvaluationSet, label: int | np.integer) -> str:
    """The first prompt of a class."""
    return prompt(dataset.templates[0], dataset.class_names[label])


def spread(indices: Int[np.ndarray, "n"], count: int) -> Int[np.ndarray, "m"]:
    """At most `count` of the indices, evenly over them."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]
