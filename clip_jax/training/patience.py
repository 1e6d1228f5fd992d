"""Ending a run that gets no better, by what metrics.jsonl says of its evaluations, so that a resumed run does alike."""

import logging

from etils import epath

from clip_jax.distributed import is_first, of_every_process
from clip_jax.training.loop import Hook, Step
from clip_jax.workdir import scores

logger = logging.getLogger(__name__)


def gets_no_better(workdir: epath.PathLike, patience: int) -> bool:
    """Whether the last `patience` evaluations of a run scored no higher than the best before them; all agree.

    Args:
      workdir: of the run, with the metrics so far; only process 0 reads them.
      patience: 0 for never.
    """
    return of_every_process(is_first() and patience > 0 and _is_over(list(scores(workdir).values()), patience))[0]


def _is_over(scores: list[float], patience: int) -> bool:
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


class Patience(Hook):
    """After an evaluation: end the run if it gets no better."""

    def __init__(self, workdir: epath.PathLike, patience: int):
        self._workdir, self._patience = workdir, patience

    def step(self, step: Step) -> bool:
        if step.last or not gets_no_better(self._workdir, self._patience):
            return False
        logger.info("step %d: the last %d evaluations were no better than before; done", step.number, self._patience)
        return True
