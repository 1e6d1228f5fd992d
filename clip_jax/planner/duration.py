"""How long a run will take on the machine at hand, from how fast it encodes images, and what would be cheaper."""

from dataclasses import replace

from clip_jax.models import variable_shapes
from clip_jax.planner.flops import forward_flops, image_flops, train_flops
from clip_jax.training.config import RunConfig
from clip_jax.training.parameters import split

_FROZEN = "visual/*"


def duration(run: RunConfig, images_per_second: float, judged: int) -> float:
    """Seconds of the steps and evaluations of a run.

    Arithmetic is taken to be as fast in training as in encoding images. What is not arithmetic is left out: reading
    and decoding, compiling, checkpoints.

    Args:
      run: the whole of it.
      images_per_second: that the machine encodes.
      judged: images that each evaluation encodes.
    """
    flops_per_second = images_per_second * image_flops(run.model)
    flops = train_flops(run)
    if run.execution.remat == "full" or run.microbatches > 1:  # what has a backward pass is encoded twice
        flops += max(0.0, flops - forward_flops(run.model)) / 2
    steps = run.total_steps * run.batch_size * flops / flops_per_second
    return steps + run.total_steps / run.eval_every * judged / images_per_second


def describe(run: RunConfig, images_per_second: float, examples: int, judged: int) -> str:
    """The duration in words, with what is cheaper.

    Args:
      run: as for `duration`.
      images_per_second: as for `duration`.
      examples: images to train on, each of which a linear probe encodes once.
      judged: as for `duration`.
    """
    seconds = duration(run, images_per_second, judged)
    cheaper = [f"a linear probe (evaluate.py --tasks linear_probe) {_spoken(examples / images_per_second)}"]
    if not run.adapters.rank and "visual" in split(variable_shapes(run.model)["params"], run.optimizer.frozen)[0]:
        frozen = replace(run, optimizer=replace(run.optimizer, frozen=(*run.optimizer.frozen, _FROZEN)))
        locked = _spoken(duration(frozen, images_per_second, judged))
        cheaper.insert(0, f"a frozen image tower (--config.optimizer.frozen={_FROZEN}) {locked}")
    return (
        f"about {_spoken(seconds)} on this machine, reading and compiling aside: {run.total_steps} steps of "
        f"{run.batch_size}; cheaper: {', '.join(cheaper)}"
    )


def _spoken(seconds: float) -> str:
    """In the unit that people would take."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
