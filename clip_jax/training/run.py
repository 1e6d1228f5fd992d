"""A whole run: from its configuration to a trained model in a workdir."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import jax

from clip_jax.data.pipeline import TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.sources import make_sources
from clip_jax.data.targets import Labels, Target, Texts
from clip_jax.distributed import on_first_process
from clip_jax.losses import LOSSES
from clip_jax.options import from_dict, to_dict
from clip_jax.processing import Preprocess, make_tokenizer
from clip_jax.training.bad_numbers import BadNumbers, report_batch
from clip_jax.training.cached_features import image_features, with_features
from clip_jax.training.checkpoints import Checkpoints
from clip_jax.training.clock import Clock
from clip_jax.training.config import RunConfig, check_same_run, make_training
from clip_jax.training.guard import initial_guard
from clip_jax.training.held_out import record_held_out
from clip_jax.training.hooks import Evaluate, Hold, Log, Save
from clip_jax.training.initial_weights import StartHead, start_from
from clip_jax.training.lock import Lock
from clip_jax.training.loop import Hook, every, on_devices, train
from clip_jax.training.metrics import MetricsWriter
from clip_jax.training.optimizer import learning_rate_schedule
from clip_jax.training.patience import Patience, gets_no_better
from clip_jax.training.preemption import Preemption
from clip_jax.training.run_config import config_to_continue, make_workdir, write_config
from clip_jax.training.start import keep_start
from clip_jax.training.state import Training, TrainState, abstract_state, initial_state
from clip_jax.training.step import make_train_step
from clip_jax.training.storage import storage
from clip_jax.training.watch import Watch

logger = logging.getLogger(__name__)

MakeEvaluate = Callable[[RunConfig, Training], Callable[[TrainState], Mapping[str, float]]]
MakeStartHead = Callable[[RunConfig, Training, TrainReader], StartHead]


def run(
    config: RunConfig,
    workdir: str,
    make_evaluate: MakeEvaluate | None = None,
    make_start_head: MakeStartHead | None = None,
) -> TrainState:
    """Train, from the newest checkpoint in `workdir` if it has one; returns the last state.

    Args:
      config: the run.
      workdir: where checkpoints, metrics and the configuration go.
      make_evaluate: makes the function of the state whose results are logged every `eval_every` steps.
      make_start_head: makes the function of the weights to start from whose result is the head; needed where the run
        trains one and starts from a model.

    Raises:
      UserError: an impossible configuration, missing data, or a workdir that holds another run or cannot be written to.
      RunStopped: too many steps in a row had bad numbers.
    """
    clock = Clock()
    _check_workdir(config, workdir)
    training = make_training(config)
    training.partitioner.check_batch_size(config.batch_size, config.microbatches, jax.process_count())
    train_step = make_train_step(training)
    reader = make_reader(config)
    evaluate = make_evaluate(config, training) if make_evaluate else None
    start_head = make_start_head(config, training, reader) if make_start_head and config.model.classes else None
    on_first_process(lambda: make_workdir(workdir))
    with ExitStack() as open_things:
        lock = on_first_process(lambda: open_things.enter_context(closing(Lock(workdir))))
        checkpoints = open_things.enter_context(closing(Checkpoints(workdir, config)))
        state = _state(checkpoints, training, config, workdir, start_head)
        on_first_process(lambda: record_held_out(config, workdir))
        on_first_process(lambda: write_config(workdir, to_dict(config)))
        hosts = jax.process_index(), jax.process_count()
        writer = on_first_process(lambda: MetricsWriter(workdir, int(state.step), lock.check))
        is_over = gets_no_better(workdir, config.patience)  # a run that was ended early stays so
        if is_over and int(state.step) < config.total_steps:
            logger.info("the run was ended early, at step %d; a higher patience lets it go on", int(state.step))
        end = int(state.step) if is_over else config.total_steps
        is_cached = config.cache_features and int(state.step) < end
        features = image_features(training, state.variables, reader) if is_cached else None
        reader = replace(reader, by_number=is_cached)
        batches = open_things.enter_context(closing(TrainBatches(reader, config.input, int(state.step), *hosts)))
        on_host = batches if features is None else with_features(batches, features)
        hooks = [Hold(lock)] if lock else []
        hooks += _hooks(config, workdir, writer, checkpoints, batches, evaluate, clock)
        return train(state, train_step, on_devices(on_host, training.partitioner), end, hooks, clock)


def _check_workdir(config: RunConfig, workdir: str) -> None:
    """See that `workdir` holds no other run, and say so if it holds a shorter one."""
    with storage("read", workdir):
        values = config_to_continue(workdir)
    if values is None:
        return
    previous = from_dict(type(config), values, f"{workdir}/config.json")
    check_same_run(config, previous)
    if config.total_steps > previous.total_steps:
        logger.info(
            "the run goes on to step %d instead of %d: from here on the learning rate follows the longer schedule",
            config.total_steps,
            previous.total_steps,
        )


def make_reader(config: RunConfig) -> TrainReader:
    """What reads the run's training data.

    Raises:
      UserError: data that is missing or without what the loss reads, or a tokenizer that is not known.
    """
    target = make_target(config)
    sources = make_sources(config.data, config.access, target.check_source)
    mixture = Mixture(*sources, config.seed, config.batch_size)
    return TrainReader(mixture, Preprocess.from_config(config.model), target, config.augment)


def make_target(config: RunConfig) -> Target:
    """What the run reads besides images: what its loss compares them with."""
    if LOSSES[config.loss].target == "label":
        return Labels(config.model.classes)
    return Texts(make_tokenizer(config.model.text))


def _state(
    checkpoints: Checkpoints, training: Training, config: RunConfig, workdir: str, start_head: StartHead | None
) -> TrainState:
    """The newest checkpoint's, or a fresh one; the model that a fresh one starts from is kept in the workdir."""
    restored = checkpoints.restore(abstract_state(training))
    if restored is None:
        state = initial_state(training, config.seed)
        if config.init.init_from:
            state = start_from(config.init, config.model, state, training.frozen, start_head)
            keep_start(workdir, config.model, state.variables)
        return state
    logger.info("resuming from step %d", int(restored.step))
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.guard)):
        return restored
    # Checkpoints of before the guard have none.
    return restored.replace(guard=jax.device_put(initial_guard(training.guard), training.partitioner.replicated))


def _hooks(
    config: RunConfig,
    workdir: str,
    writer: MetricsWriter | None,
    checkpoints: Checkpoints,
    batches: TrainBatches,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None,
    clock: Clock,
) -> list[Hook]:
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    log = Log(writer, config.log_every, config.total_steps, config.batch_size, schedule, batches, clock)
    bad_numbers = BadNumbers(config.guard.max_skipped, checkpoints, partial(report_batch, workdir, batches.reader))
    save = Save(checkpoints, config.checkpoint_every, log, clock)
    hooks = [log, bad_numbers, Watch(clock, config.stall_seconds)]
    if evaluate is not None:  # before the save: what is killed in it is evaluated again
        measure = Evaluate(evaluate, log, clock, before=bool(config.init.init_from))
        hooks += [every(config.eval_every, measure), every(config.eval_every, Patience(workdir, config.patience))]
    return [*hooks, save, Preemption(save)]
