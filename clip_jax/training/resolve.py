"""What a configuration leaves to the model it starts from and to the data, filled in once, before anything else.

config.json holds what came of it. A run that goes on is compared with that, so it notices when the data has changed.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from clip_jax.data.damage import Damaged
from clip_jax.data.example import Source
from clip_jax.data.sources import make_sources
from clip_jax.data.targets import class_names, classes_of
from clip_jax.errors import UserError
from clip_jax.losses import LOSSES
from clip_jax.training.config import RunConfig
from clip_jax.training.run import make_reader
from clip_jax.training.run_config import config_to_continue
from clip_jax.weights import architecture

logger = logging.getLogger(__name__)

_DEFAULT_STEPS = next(item.default for item in fields(RunConfig) if item.name == "total_steps")


def with_model(values: Mapping[str, Any], workdir: str | None) -> dict[str, Any]:
    """Plain values with the architecture of `init_from`, if they name a model to start from and no architecture.

    Args:
      values: as a config file has them.
      workdir: of a run that goes on, whose own configuration counts where the model that it began with is gone.

    Raises:
      UserError: there is no such model.
    """
    init_from = values.get("init_from")
    if "model" in values or not isinstance(init_from, str) or not init_from:
        return dict(values)
    try:
        model = replace(architecture(init_from), classes=()).to_dict()  # a head is the run's own
    except UserError:
        previous = (config_to_continue(workdir) if workdir else None) or {}
        if previous.get("init_from") != init_from:
            raise
        model = previous["model"]
    return {**values, "model": model}


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with the classes of its head, the steps that its epochs are, and those of one epoch.

    The data is opened only if something depends on it.

    Raises:
      UserError: data that is missing, or has one caption only; or both epochs and total_steps.
    """
    config = with_classes(config)
    if not config.epochs and config.eval_every and config.checkpoint_every:
        return config
    sources = make_reader(config).mixture.sources
    if LOSSES[config.loss].target == "text":
        check_captions_differ(sources)
    examples = sum(map(len, sources))
    batch_size = min(config.batch_size, examples) if config.epochs else config.batch_size
    if batch_size < config.batch_size:
        logger.info("batch_size is %d, not %d: there are no more images to train on", batch_size, config.batch_size)
    total_steps = math.ceil(config.epochs * examples / batch_size) or config.total_steps
    if config.total_steps not in (_DEFAULT_STEPS, total_steps):
        raise UserError(
            f"epochs={config.epochs:g} are {total_steps} steps of {batch_size}, but total_steps is "
            f"{config.total_steps}: leave one out, as with --config.epochs=0"
        )
    epoch = math.ceil(examples / batch_size)
    return replace(
        config,
        batch_size=batch_size,
        total_steps=total_steps,
        eval_every=config.eval_every or epoch,
        checkpoint_every=config.checkpoint_every or epoch,
    )


def with_classes(config: RunConfig) -> RunConfig:
    """The configuration with the classes of its training data, where its loss trains a head and it names none.

    Raises:
      UserError: data that is missing or has no named classes.
    """
    if LOSSES[config.loss].target != "label" or config.model.classes:
        return config
    sources, _ = make_sources(config.data, config.access, class_names)
    return replace(config, model=replace(config.model, classes=classes_of(sources)))


def check_captions_differ(sources: Sequence[Source]) -> None:
    """See that there is something to tell apart; reads two examples where the first and the last one differ.

    Raises:
      UserError: all examples have the same caption.
    """
    seen: set[str] = set()
    for source in sources:
        for index in (0, len(source) - 1, *range(1, len(source) - 1)):
            with suppress(Damaged):
                seen.update(source[index].captions)
            if len(seen) > 1:
                return
    names = ", ".join(source.name for source in sources)
    raise UserError(
        f"all captions of {names} are {next(iter(seen), '')!r}: a model learns from what differs, so add images with "
        "other captions, or of another class"
    )
