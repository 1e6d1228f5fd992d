"""A whole run: from its configuration to a trained model in a workdir."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import jax

from clip_jax.data.pipeline import train_batches
from clip_jax.data.sources import make_sources
from clip_jax.models import CLIP
from clip_jax.parallel import check_batch_size, make_mesh
from clip_jax.processing import Preprocess, make_tokenizer
from clip_jax.training.checkpoint import Checkpoints, read_config, write_config
from clip_jax.training.config import RunConfig, check_same_run
from clip_jax.training.loop import Evaluate, LoopConfig, train
from clip_jax.training.metrics import MetricsWriter
from clip_jax.training.optimizer import learning_rate_schedule, make_optimizer
from clip_jax.training.state import TrainState, abstract_state, initial_state
from clip_jax.training.step import make_train_step


def run(values: Mapping[str, Any], workdir: str, make_evaluate: Any = None) -> TrainState:
    """Train, from the newest checkpoint in `workdir` if it has one; returns the last state.

    Args:
      values: the plain values of a config file.
      workdir: where checkpoints, metrics and the configuration go.
      make_evaluate: (RunConfig, CLIP, Mesh) -> function of the state that returns metrics to log.

    Raises:
      UserError: an impossible configuration, missing data, or a workdir that holds another run.
    """
    config = RunConfig.from_dict(values)
    previous = read_config(workdir)
    if previous is not None:
        check_same_run(values, previous)
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, config.step.microbatches, mesh, jax.process_count())
    model = CLIP(config.model, config.execution)
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    train_step = make_train_step(model, optimizer, config.step, mesh, config.rules)
    sources, weights = make_sources(config.data, config.data_dir)
    evaluate: Evaluate | None = make_evaluate(config, model, mesh) if make_evaluate else None
    write_config(workdir, values)
    with closing(Checkpoints(workdir)) as checkpoints:
        if checkpoints.latest_step() is None:
            state = initial_state(model, optimizer, mesh, config.seed, config.rules)
        else:
            state = checkpoints.restore(abstract_state(model, optimizer, mesh, config.rules))
        start = int(state.step)
        batches = train_batches(
            sources,
            weights,
            seed=config.seed,
            batch_size=config.batch_size,
            preprocess=Preprocess.from_config(config.model),
            tokenizer=make_tokenizer(config.model.text),
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with closing(batches):
            return _train(config, state, train_step, batches, mesh, checkpoints, workdir, evaluate)


def _train(config, state, train_step, batches, mesh, checkpoints, workdir, evaluate) -> TrainState:
    """The loop, with the metrics written by the first host alone."""
    writer = MetricsWriter(workdir, int(state.step)) if jax.process_index() == 0 else None
    loop = LoopConfig(
        config.total_steps, config.batch_size, config.log_every, config.eval_every, config.checkpoint_every
    )
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    try:
        return train(state, train_step, batches, loop, mesh, checkpoints, writer, schedule, evaluate)
    finally:
        if writer is not None:
            writer.close()
