"""What lies where in the workdir of a training run.

WORKDIR/config.json        the resolved configuration
WORKDIR/metrics.jsonl      one JSON object per line
WORKDIR/checkpoints/STEP   a model folder each, with the training state beside the model
WORKDIR/damaged/STEP       checkpoints that turned out to be damaged
WORKDIR/lock               which process trains here
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from clip_jax.errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS, RUN_CONFIG, METRICS = "checkpoints", "config.json", "metrics.jsonl"
EVAL, EVAL_EMA = "eval/", "eval_ema/"  # what the keys of an evaluation begin with: of the weights, of their average
BEST, EMA = "@best", "@ema"


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as Orbax wants it; addresses such as gs://... stay as they are."""
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.resolve()


def without_suffixes(path: epath.PathLike) -> tuple[str, bool, bool]:
    """(the path alone, whether `@best` follows it, whether `@ema` comes last)."""
    path = str(path)
    rest = path.removesuffix(EMA)
    return rest.removesuffix(BEST), rest.endswith(BEST), path.endswith(EMA)


def is_meant(path: epath.PathLike) -> bool:
    """Whether `path` is a workdir, or asks for the best step of one."""
    bare, best, _ = without_suffixes(path)
    return best or (absolute(bare) / CHECKPOINTS).is_dir()


def step_folder(path: epath.PathLike) -> epath.Path:
    """The newest step of a workdir, or the best of `WORKDIR@best`.

    The best of `WORKDIR@best@ema` is the one whose average is best: what is judged is what is opened.

    Raises:
      UserError: no step is finished, or none was evaluated where the best is asked for.
    """
    bare, best, averaged = without_suffixes(path)
    workdir = absolute(bare)
    steps = finished_steps(workdir)
    step = best_step(workdir, steps, averaged) if best else steps[-1]
    if step is None:
        what = "average" if averaged else "checkpoint"
        raise UserError(f"no {what} in {workdir} was evaluated, so none is best; leave {BEST} out for the newest")
    return workdir / CHECKPOINTS / str(step)


def finished_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of the finished checkpoints, the newest last.

    Raises:
      UserError: there is none.
    """
    if not (steps := steps_of(workdir)):
        raise UserError(f"{workdir} holds no finished checkpoint; expected {absolute(workdir) / CHECKPOINTS}/STEP")
    return steps


def steps_of(workdir: epath.PathLike) -> list[int]:
    """The steps of the finished checkpoints, the newest last; none in a workdir that has no checkpoints yet."""
    import orbax.checkpoint as ocp

    folder = absolute(workdir) / CHECKPOINTS
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def best_step(workdir: epath.PathLike, steps: Sequence[int], averaged: bool = False) -> int | None:
    """The one of `steps` whose top-1 accuracy, averaged over the evaluation sets, is highest; None if none has any.

    Steps are comparable only where the same sets were measured: those of the newest evaluation count.

    Args:
      workdir: of the run.
      steps: those to choose from.
      averaged: whether to judge the moving average of the weights, not the weights themselves.
    """
    prefix = EVAL_EMA if averaged else EVAL
    accuracies: dict[int, dict[str, float]] = {}
    for line in read_metrics(workdir):
        measured = {key: line[key] for key in line if key.startswith(prefix) and key.endswith("/acc1")}
        accuracies.setdefault(line["step"], {}).update(measured)
    evaluated = {step: values for step, values in sorted(accuracies.items()) if values and step in steps}
    sets = list(evaluated.values())[-1].keys() if evaluated else ()
    scores = {step: np.mean(list(values.values())) for step, values in evaluated.items() if values.keys() == sets}
    return max(scores, key=lambda step: (scores[step], step), default=None)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order, but for damaged ones; none if there is no such file."""
    lines, damaged = split_metrics(workdir)
    if damaged:
        logger.warning("%s: left out %d damaged lines: %.80s", absolute(workdir) / METRICS, len(damaged), damaged[0])
    return lines


def split_metrics(workdir: epath.PathLike) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl as objects, in order, and the texts of those that are damaged.

    A half-written last one (the process was killed) is neither.
    """
    file = absolute(workdir) / METRICS
    texts = file.read_bytes().decode(errors="replace").split("\n")[:-1] if file.exists() else []
    parsed = [(_parsed(text), text) for text in texts if text]
    return [line for line, _ in parsed if line is not None], [text for line, text in parsed if line is None]


def write_whole(path: epath.Path, text: str) -> None:
    """Write a file so that it is never half-written under its name."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _parsed(line: str) -> dict[str, Any] | None:
    """The object with a step in a line of metrics; None if it holds none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
