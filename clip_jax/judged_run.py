"""A run that is judged: while it goes on, and, where it holds images out, before and after."""

import logging
from functools import partial
from typing import Any

import jax

from clip_jax import model_folder
from clip_jax.data.reader import TrainReader
from clip_jax.data.sources import held_out_of
from clip_jax.distributed import is_first, together
from clip_jax.errors import UserError
from clip_jax.evaluation.before_after import compare, table
from clip_jax.evaluation.datasets import EvaluationSet, evaluation_set, held_out_sets
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.head import check_head_prompts, linear_probe_head, templates_for, zero_shot_head
from clip_jax.evaluation.judge import check_judge, judge
from clip_jax.evaluation.rows import write_rows
from clip_jax.planner.duration import describe
from clip_jax.training.config import RunConfig
from clip_jax.training.initial_weights import StartHead
from clip_jax.training.run import run
from clip_jax.training.state import Training, TrainState
from clip_jax.training.storage import storage
from clip_jax.workdir import BEST, EVAL, EVAL_EMA, REPORT, RESULTS, START, absolute, best_step, read_metrics, steps_of

logger = logging.getLogger(__name__)


class Evaluation:
    """What training calls every `eval_every` steps: accuracy, or of captioned images recall.

    Where the run keeps an average of the weights, it is measured as well, under keys of its own. Before the first step
    of a run that starts from a model it says how long the run will take.

    Attributes:
      encoders: of the model that is trained.
      held_out: what the run holds out.
      references: the config's `eval_datasets`.
    """

    def __init__(self, config: RunConfig, training: Training):
        self._config, self.encoders = config, make_encoders(training.model, training.partitioner)
        self.held_out = together(partial(held_out_sets, config.data))
        self.references = together(lambda: [evaluation_set(name, config.access) for name in config.eval_datasets])
        names = [dataset.name for dataset in self._datasets]
        for dataset in self._datasets:
            if names.count(dataset.name) > 1:
                raise UserError(
                    f"two data sets to judge by are called {dataset.name}, so their results would be one: rename the "
                    "source in data (with kind=folder), or name eval_datasets once each"
                )
            check_judge(self.encoders, dataset)

    def __call__(self, state: TrainState) -> dict[str, float]:
        models = {EVAL: state.variables, **({EVAL_EMA: state.ema_variables} if state.ema else {})}
        values = {
            f"{prefix}{dataset.name}/{metric}": value
            for prefix, variables in models.items()
            for dataset in self._datasets
            for metric, value in judge(self.encoders, variables, dataset).metrics.items()
        }
        if self.held_out and not int(state.step):
            logger.info("%s", self._duration(state.variables))
        return values

    @property
    def _datasets(self) -> list[EvaluationSet]:
        return [*self.held_out, *self.references]

    def _duration(self, variables: Any) -> str:
        examples = sum(len(dataset.train()) for dataset in self.held_out)
        judged = sum(len(dataset.source) for dataset in self._datasets)
        rate = self.encoders.images_per_second(variables, len(self.held_out[0].source))
        return describe(self._config, rate, examples, judged)


def train(config: RunConfig, workdir: str) -> None:
    """Train, and judge on what the run holds out and on the data sets that the config names.

    A run that starts from a model and holds images out ends with a table: on the terminal, in WORKDIR/results.json,
    and with pictures in WORKDIR/report.html.

    Raises:
      UserError, RunStopped: as `run`; or the data sets are missing.
    """
    evaluations: list[Evaluation] = []

    def make_evaluate(config: RunConfig, training: Training) -> Evaluation:
        evaluations.append(Evaluation(config, training))
        return evaluations[0]

    holds_out = bool(held_out_of(config.data))
    evaluated = holds_out or config.eval_datasets
    state = run(config, workdir, make_evaluate if evaluated else None, start_of_head)
    if holds_out and config.init.init_from:
        _say_what_came_of_it(workdir, evaluations[0], state)


def _say_what_came_of_it(workdir: str, evaluation: Evaluation, state: TrainState) -> None:
    """Compare the model before and after; all processes compute, the first one speaks."""
    if not (absolute(workdir) / START).exists():
        logger.warning("%s is gone, so there is nothing to compare the model with", absolute(workdir) / START)
        return
    _, start = together(partial(model_folder.read, absolute(workdir) / START))
    start = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, state.variables))
    averaged = state.ema_variables if state.ema else None
    outcome = compare(evaluation.encoders, start, state.variables, averaged, evaluation.held_out, evaluation.references)
    if not is_first():
        return
    from clip_jax.reports.before_after import write_before_after

    results, report = absolute(workdir) / RESULTS, absolute(workdir) / REPORT
    with storage("write", results):
        write_rows(results, outcome.rows())
        write_before_after(report, f"Before and after: {workdir}", read_metrics(workdir), outcome)
    print(table(outcome))
    best = best_step(workdir, steps_of(workdir))
    if best not in (None, int(state.step)):
        print(f"step {best} was better, by the mean accuracy of its evaluation: {workdir}{BEST} opens it")
    print(f"report: {report}")


def start_of_head(config: RunConfig, training: Training, reader: TrainReader) -> StartHead:
    """What makes the head of a run that starts from a model without one: a function of that model's weights."""
    encoders, sources = make_encoders(training.model, training.partitioner), reader.mixture.sources
    if config.init.head_from == "linear_probe":
        return partial(linear_probe_head, encoders, sources=sources)
    datasets = together(lambda: [evaluation_set(name, config.access) for name in config.eval_datasets])
    templates = templates_for(config.model.classes, sources, datasets)
    check_head_prompts(encoders, templates)
    return partial(zero_shot_head, encoders, templates=templates)
