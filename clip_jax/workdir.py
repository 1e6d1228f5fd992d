"""What lies where in the workdir of a training run.

WORKDIR/config.json        the resolved configuration
WORKDIR/metrics.jsonl      one JSON object per line
WORKDIR/checkpoints/STEP   a model folder each, with the training state beside the model
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from clip_jax.errors import UserError

CHECKPOINTS, RUN_CONFIG, METRICS = "checkpoints", "config.json", "metrics.jsonl"
BEST = "@best"


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as Orbax wants it; addresses such as gs://... stay as they are."""
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.resolve()


def is_meant(path: epath.PathLike) -> bool:
    """Whether `path` is a workdir, or asks for the best step of one."""
    return str(path).endswith(BEST) or (absolute(path) / CHECKPOINTS).is_dir()


def step_folder(path: epath.PathLike) -> epath.Path:
    """The newest step of a workdir, or the best of `WORKDIR@best`.

    Raises:
      UserError: no step is finished, or none was evaluated where the best is asked for.
    """
    import orbax.checkpoint as ocp

    workdir = absolute(str(path).removesuffix(BEST))
    folder = workdir / CHECKPOINTS
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{workdir} holds no finished checkpoint; expected {folder}/STEP")
    step = best_step(workdir, steps) if str(path).endswith(BEST) else steps[-1]
    if step is None:
        raise UserError(f"no checkpoint in {workdir} was evaluated, so none is best; leave {BEST} out for the newest")
    return folder / str(step)


def best_step(workdir: epath.PathLike, steps: Sequence[int]) -> int | None:
    """The one of `steps` whose top-1 accuracy, averaged over the evaluation sets, is highest; None if none has any.

    Steps are comparable only where the same sets were measured: those of the newest evaluation count.
    """
    accuracies: dict[int, dict[str, float]] = {}
    for line in read_metrics(workdir):
        accuracies.setdefault(line["step"], {}).update({key: line[key] for key in line if key.endswith("/acc1")})
    evaluated = {step: values for step, values in sorted(accuracies.items()) if values and step in steps}
    sets = list(evaluated.values())[-1].keys() if evaluated else ()
    scores = {step: np.mean(list(values.values())) for step, values in evaluated.items() if values.keys() == sets}
    return max(scores, key=lambda step: (scores[step], step), default=None)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order; none if there is no such file.

    A half-written last one (the process was killed) is left out.

    Raises:
      UserError: another line is damaged.
    """
    file = absolute(workdir) / METRICS
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [_parsed(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line]


def write_whole(path: epath.Path, text: str) -> None:
    """Write a file so that it is never half-written under its name."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); mend or remove it") from error
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise UserError(f"{where} is no object with a step; mend or remove it")
    return values
