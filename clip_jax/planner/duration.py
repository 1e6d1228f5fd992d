"""How long a run will take on the machine at hand, from how fast it encodes images, and what would be cheaper."""

from dataclasses import replace

from clip_jax.data.pipeline import InputConfig
from clip_jax.models import variable_shapes
from clip_jax.planner.flops import forward_flops, image_flops, train_flops
from clip_jax.processing import Augment
from clip_jax.training.adapters import AdapterConfig
from clip_jax.training.config import RunConfig
from clip_jax.training.parameters import split

_LOCKED = "--config.optimizer.frozen='visual/*' --config.cache_features=true --config.augment.crop=center"


def duration(run: RunConfig, images_per_second: float, examples: int, judged: int) -> float:
    """Seconds of the steps and evaluations of a run.

    Arithmetic is taken to be as fast in training as in encoding images. What is not arithmetic is left out: reading
    and decoding, compiling, checkpoints.

    Args:
      run: the whole of it.
      images_per_second: that the machine encodes.
      examples: images to train on.
      judged: images that each evaluation encodes.
    """
    forward, flops = forward_flops(run.model), train_flops(run)
    images = run.total_steps / run.eval_every * judged
    if run.cache_features:
        forward -= image_flops(run.model)
        images += examples
    if run.execution.remat == "full" or run.microbatches > 1:  # what has a backward pass is encoded twice
        flops += (flops - forward) / 2
    as_images = run.total_steps * run.batch_size * flops / image_flops(run.model)
    return (as_images + images) / images_per_second


def describe(run: RunConfig, images_per_second: float, examples: int, judged: int) -> str:
    """The duration in words, with what is cheaper.

    Args:
      run: as for `duration`.
      images_per_second: as for `duration`.
      examples: as for `duration`; a linear probe encodes each of them once.
      judged: as for `duration`.
    """
    cheaper = [f"a linear probe (evaluate.py --tasks linear_probe) {_spoken(examples / images_per_second)}"]
    learns = "visual" in split(variable_shapes(run.model)["params"], run.optimizer.frozen)[0]
    if learns and not run.adapters.rank:  # with adapters all else is frozen already
        locked = _spoken(duration(_locked(run), images_per_second, examples, judged))
        cheaper.insert(0, f"a frozen image tower ({_LOCKED}) {locked}")
    return (
        f"about {_spoken(duration(run, images_per_second, examples, judged))} on this machine, reading and compiling "
        f"aside: {run.total_steps} steps of {run.batch_size}; cheaper: {', '.join(cheaper)}"
    )


def _locked(run: RunConfig) -> RunConfig:
    """The run with an image tower that learns nothing, and encodes each image once."""
    optimizer = replace(run.optimizer, frozen=("visual/*",), learning_rates={}, weight_decays={})
    same = {"augment": Augment(crop="center"), "patch_dropout": 0.0, "input": InputConfig()}
    return replace(run, optimizer=optimizer, adapters=AdapterConfig(), cache_features=True, **same)


def _spoken(seconds: float) -> str:
    """In the unit that people would take."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
