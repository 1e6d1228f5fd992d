"""The classes of a run's head."""

from dataclasses import replace

from clip_jax.data.sources import make_sources
from clip_jax.data.targets import class_names, classes_of
from clip_jax.losses import LOSSES
from clip_jax.training.config import RunConfig


def with_classes(config: RunConfig) -> RunConfig:
    """The configuration with the classes of its training data, where its loss trains a head and it names none.

    Raises:
      UserError: data that is missing or has no named classes.
    """
    if LOSSES[config.loss].target != "label" or config.model.classes:
        return config
    sources, _ = make_sources(config.data, config.access, class_names)
    return replace(config, model=replace(config.model, classes=classes_of(sources)))
