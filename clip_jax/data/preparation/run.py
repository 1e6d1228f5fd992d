"""A preparation from the first look at its destination to the data set: what is done already is not done again."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_jax.data import files
from clip_jax.data.damage import REASONS
from clip_jax.data.preparation import report
from clip_jax.data.preparation.dataset import assemble
from clip_jax.data.preparation.destination import Destination
from clip_jax.data.preparation.job import Job
from clip_jax.data.preparation.ranges import (
    PART,
    HashStage,
    ShardStage,
    Stage,
    decide_duplicates,
    summary,
    total,
    whole_file,
)
from clip_jax.data.preparation.runners import OnDone, Runner
from clip_jax.errors import UserError

logger = logging.getLogger(__name__)

_PLAN, _LOCK, _DATASET = "plan.json", "lock", "dataset"
_FEW = 10  # damaged samples that no preparation stops for


def run(job: Job, destination: Destination, runner: Runner, on_report: Callable[[str], None]) -> None:
    """Make the data set, or what is missing of it.

    Args:
      job: what is made.
      destination: where it goes.
      runner: who works.
      on_report: called with the folder in which the report stands, before that gets its name.

    Raises:
      UserError: the destination holds something else, or cannot be written; too many samples are damaged; none is left.
    """
    if os.path.lexists(destination.finished):
        _check_same(job, os.path.join(destination.finished, report.FILE), destination.finished)
        logger.info("%s is prepared already", destination.finished)
    else:
        with _workplace(job, destination):
            _work(job, runner)
            _finish(job, destination, on_report)
    shutil.rmtree(destination.unfinished, ignore_errors=True)


def _work(job: Job, runner: Runner) -> None:
    """Run all stages."""
    if job.options.dedup != "none":
        _run_stage(HashStage(), "hashing", job, runner, lambda number: None)
        decide_duplicates(job)
    damaged = 0

    def check(number: int) -> None:
        nonlocal damaged
        damaged += sum(summary(job, number).left_out[reason] for reason in REASONS)
        if damaged > max(_FEW, job.options.max_damaged * job.shape.samples):
            raise UserError(
                f"{damaged} samples are damaged so far, more than max_damaged={job.options.max_damaged} of "
                f"{job.shape.samples}, as in {_first_damage(job, number)}: mend the source, or allow more"
            )

    _run_stage(ShardStage(), "writing", job, runner, check)


def _finish(job: Job, destination: Destination, on_report: Callable[[str], None]) -> None:
    """Make the data set of the shards, all of which are there."""
    summaries = [summary(job, number) for number in range(job.shards)]
    everything = total(summaries)
    if not everything.kept:
        shutil.rmtree(destination.unfinished)
        with suppress(OSError):
            os.rmdir(destination.folder)
        raise UserError(f"none of the {job.shape.samples} samples is left: {report.words(everything.left_out)}")
    folder = os.path.join(job.folder, _DATASET)
    try:
        os.makedirs(folder, exist_ok=True)
        report.write(folder, job, everything)
        on_report(folder)
        assemble(job, destination, summaries, folder)
        os.replace(folder, destination.finished)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def _run_stage(stage: Stage, verb: str, job: Job, runner: Runner, check: OnDone) -> None:
    """Run a stage for the ranges that are not done; `check` is called for every range, as soon as it is."""
    done = [number for number in range(job.shards) if stage.is_done(job, number)]
    missing = sorted(set(range(job.shards)) - set(done))
    for number in done:
        check(number)
    samples = sum(len(job.range(number)) for number in done)
    with tqdm(desc=verb, total=job.shape.samples, initial=samples, unit=" images") as bar:
        if missing:
            runner.run(stage, job, missing, bar, check)


def _first_damage(job: Job, number: int) -> str:
    shown = summary(job, number).shown
    return next(
        (f"{key or 'a sample'}: {message}" for _, reason, key, message in shown if reason in REASONS), "those before"
    )


@contextmanager
def _workplace(job: Job, destination: Destination) -> Iterator[None]:
    """The folder to work in, for this process alone, where nothing but this preparation is or was begun."""
    _check_place(job, destination)
    try:
        os.makedirs(job.folder, exist_ok=True)
        lock = open(os.path.join(job.folder, _LOCK), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {job.folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process prepares {job.folder} at this moment") from error
        plan = os.path.join(job.folder, _PLAN)
        if os.path.exists(plan):
            _check_same(job, plan, job.folder)
        else:
            with whole_file(plan) as part, open(part, "w", encoding="utf-8") as file:
                json.dump({"preparation": job.identity}, file, indent=1)
        for part in Path(job.folder).rglob(f"*{PART}"):  # what a killed run left
            part.unlink(missing_ok=True)
        yield


def _check_place(job: Job, destination: Destination) -> None:
    """Refuse a destination in the source, or with something else in it."""
    path = getattr(job.config, "path", "")
    inside = Path(destination.finished).resolve().is_relative_to(Path(path).resolve())
    if path and not files.is_remote(path) and os.path.isdir(path) and inside:
        raise UserError(f"{destination.folder} lies in the source {path}: name another DST or --name")
    try:
        names = set(os.listdir(destination.folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write {destination.folder}: {error.strerror}") from error
    others = names - {os.path.basename(destination.unfinished)}
    if others:
        raise UserError(f"{destination.folder} holds something else, such as {min(others)}: name another DST or --name")


def _check_same(job: Job, path: str, place: str) -> None:
    """Refuse a folder whose file `path` describes another preparation, or none."""
    try:
        there: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))["preparation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} is not from clip_jax.data.prepare: name another DST or --name") from error
    here = json.loads(json.dumps(job.identity))
    different = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if different:
        what = ", ".join(f"{name} {there.get(name)!r}, now {here.get(name)!r}" for name in different)
        raise UserError(f"{place} was prepared otherwise: {what}; remove it, or name another DST or --name")
