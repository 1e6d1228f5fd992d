"""What a model can be judged by. A new task costs an entry in `TASKS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Protocol

from clip_jax.errors import UserError
from clip_jax.evaluation.classifiers import kept_zero_shot
from clip_jax.evaluation.datasets import SEVERAL_CLASSES, EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.few_shot import few_shot
from clip_jax.evaluation.head import classify_by_head, knows
from clip_jax.evaluation.linear_probe import linear_probe
from clip_jax.evaluation.retrieval import zero_shot_retrieval
from clip_jax.evaluation.zero_shot import check_prompts


class Result(Protocol):
    """What comes of a task.

    Attributes:
      task: as CLIP_benchmark calls it.
      dataset: what the model was judged on.
    """

    task: str
    dataset: EvaluationSet

    @property
    def metrics(self) -> dict[str, float]:
        """By the names of CLIP_benchmark, where it has them."""
        ...


@dataclass(frozen=True)
class Task:
    """A way to judge a model.

    Attributes:
      run: encodes a data set, with or without progress bars.
      needs: what a data set must have for it, in words.
      suits: whether a data set has it, for a model with a head of some classes.
      check: refuses, before anything is computed, what `run` would refuse of the texts.
    """

    run: Callable[[Encoders, Variables, EvaluationSet, bool], Result]
    needs: str
    suits: Callable[[EvaluationSet, Sequence[str]], bool]
    check: Callable[[Encoders, EvaluationSet], None] = lambda encoders, dataset: None


_TRAINING = "training split whose images have one named class each"


def _has_classes(dataset: EvaluationSet, _: Sequence[str]) -> bool:
    return bool(dataset.class_names)


def _has_training_split(dataset: EvaluationSet, _: Sequence[str]) -> bool:
    return bool(dataset.class_names) and dataset.train is not None and dataset.metric != SEVERAL_CLASSES


def _has_captions(dataset: EvaluationSet, _: Sequence[str]) -> bool:
    return bool(dataset.source[0].captions)


def _head_knows(dataset: EvaluationSet, classes: Sequence[str]) -> bool:
    return knows(classes, dataset)


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "head": Task(classify_by_head, "classes that a head of the model has all", _head_knows),
        "zeroshot": Task(kept_zero_shot, "named classes", _has_classes, check_prompts),
        "retrieval": Task(zero_shot_retrieval, "captions", _has_captions),
        "linear_probe": Task(linear_probe, _TRAINING, _has_training_split),
        "few_shot": Task(few_shot, _TRAINING, _has_training_split),
    }
)


def chosen_tasks(dataset: EvaluationSet, names: Sequence[str] = (), classes: Sequence[str] = ()) -> list[Task]:
    """The tasks to judge a model by on a data set.

    Args:
      dataset: its labels or captions are what tasks need.
      names: of `TASKS`; without any, the first one that the data set suits.
      classes: of the model's head, if it has one.

    Raises:
      UserError: there is no such task, or the data set lacks what it needs.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}: expected {' or '.join(TASKS)}")
        if not TASKS[name].suits(dataset, classes):
            raise UserError(f"{dataset.name} has no {TASKS[name].needs}, which {name} needs")
    suitable = (task for task in TASKS.values() if task.suits(dataset, classes))
    chosen = [TASKS[name] for name in names] or list(islice(suitable, 1))
    if not chosen:
        raise UserError(f"{dataset.name} has neither named classes nor captions")
    return chosen
