"""What lies where in the workdir of a training run.

WORKDIR/config.json        the resolved configuration
WORKDIR/metrics.jsonl      one JSON object per line
WORKDIR/start              the model that the run started from, a model folder, if it did not start from random weights
WORKDIR/held_out.json      which images it trains on and which it is judged by, if it holds some out
WORKDIR/checkpoints/STEP   a model folder each, with the training state beside the model
WORKDIR/results.json       what came of it, of a run that holds some out: before and after
WORKDIR/report.html        the same as a page with pictures
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
START, HELD_OUT, RESULTS, REPORT = "start", "held_out.json", "results.json", "report.html"
EVAL, EVAL_EMA = "eval/", "eval_ema/"  # what the keys of an evaluation begin with: of the weights, of their average
BEST, EMA = "@best", "@ema"
_SCORES = ("/acc1", "/image_retrieval_recall@1")  # a run is as good as the first of these says that it has


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
    """The one of `steps` whose score is highest, of equals the newest; None if none has any."""
    found = scores(workdir, steps, averaged)
    return max(found, key=lambda step: (found[step], step), default=None)


def scores(workdir: epath.PathLike, steps: Sequence[int] | None = None, averaged: bool = False) -> dict[int, float]:
    """How good a run was at its evaluated steps, ascending: top-1 accuracy averaged over the evaluation sets.

    Where no set has classes it is the recall of images by their captions. Steps are comparable only where the same sets
    were measured: those of the newest evaluation count.

    Args:
      workdir: of the run.
      steps: which of them; by default all.
      averaged: whether to judge the moving average of the weights, not the weights themselves.
    """
    prefix = EVAL_EMA if averaged else EVAL
    lines = [line for line in read_metrics(workdir) if steps is None or line["step"] in steps]
    for ending in _SCORES:
        measured: dict[int, dict[str, float]] = {}
        for line in sorted(lines, key=lambda line: line["step"]):
            own = {key: line[key] for key in line if key.startswith(prefix) and key.endswith(ending)}
            if own:
                measured.setdefault(line["step"], {}).update(own)
        if measured:
            sets = list(measured.values())[-1].keys()
            return {step: float(np.mean(list(own.values()))) for step, own in measured.items() if own.keys() == sets}
    return {}


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
