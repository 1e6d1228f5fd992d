"""What a model can be judged by. A new task costs an entry in `TASKS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import ClassVar, Protocol

from clip_jax.errors import UserError
from clip_jax.evaluation.classifiers import kept_zero_shot
from clip_jax.evaluation.datasets import SEVERAL_CLASSES, EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.few_shot import few_shot
from clip_jax.evaluation.linear_probe import linear_probe
from clip_jax.evaluation.retrieval import zero_shot_retrieval
from clip_jax.evaluation.zero_shot import check_prompts


class Result(Protocol):
    """What comes of a task.

    Attributes:
      task: as CLIP_benchmark calls it.
      dataset: what the model was judged on.
    """

    task: ClassVar[str]
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
      suits: whether a data set has it.
      check: refuses, before anything is computed, what `run` would refuse of the texts.
    """

    run: Callable[[Encoders, Variables, EvaluationSet, bool], Result]
    needs: str
    suits: Callable[[EvaluationSet], bool]
    check: Callable[[Encoders, EvaluationSet], None] = lambda encoders, dataset: None


_TRAINING = "training split whose images have one named class each"


def _has_training_split(dataset: EvaluationSet) -> bool:
    return bool(dataset.class_names) and dataset.train is not None and dataset.metric != SEVERAL_CLASSES


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "zeroshot": Task(kept_zero_shot, "named classes", lambda dataset: bool(dataset.class_names), check_prompts),
        "retrieval": Task(zero_shot_retrieval, "captions", lambda dataset: bool(dataset.source[0].captions)),
        "linear_probe": Task(linear_probe, _TRAINING, _has_training_split),
        "few_shot": Task(few_shot, _TRAINING, _has_training_split),
    }
)


def chosen_tasks(dataset: EvaluationSet, names: Sequence[str] = ()) -> list[Task]:
    """The tasks to judge a model by on a data set.

    Args:
      dataset: its labels or captions are what tasks need.
      names: of `TASKS`; without any, the first one that the data set suits.

    Raises:
      UserError: there is no such task, or the data set lacks what it needs.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}: expected {' or '.join(TASKS)}")
        if not TASKS[name].suits(dataset):
            raise UserError(f"{dataset.name} has no {TASKS[name].needs}, which {name} needs")
    suitable = (task for task in TASKS.values() if task.suits(dataset))
    chosen = [TASKS[name] for name in names] or list(islice(suitable, 1))
    if not chosen:
        raise UserError(f"{dataset.name} has neither named classes nor captions")
    return chosen
