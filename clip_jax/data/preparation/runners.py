"""Who works at the ranges: this process, several of them, or the workers of Apache Beam."""

import functools
import multiprocessing
import shlex
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from clip_jax.data.preparation.job import Job
from clip_jax.data.preparation.ranges import Stage
from clip_jax.data.processes import process_pool
from clip_jax.errors import UserError

OnDone = Callable[[int], None]  # is told the number of a range whose files are there

_POLL = 0.5  # seconds between two looks at how far the processes are


@runtime_checkable
class Runner(Protocol):
    """Runs a stage for some ranges."""

    def run(self, stage: Stage, job: Job, numbers: Sequence[int], bar: tqdm, on_done: OnDone) -> None:
        """Return when the files of all these ranges are there.

        Args:
          stage: what is done.
          job: the preparation.
          numbers: of the ranges.
          bar: counts samples.
          on_done: called in this process; it may raise, which ends the work.

        Raises:
          UserError: a file cannot be written, or a worker has died.
        """


class InProcess:
    """This process, one range after the other."""

    def run(self, stage: Stage, job: Job, numbers: Sequence[int], bar: tqdm, on_done: OnDone) -> None:
        """See `Runner`."""
        for number in numbers:
            stage.run(job, number, bar.update)
            on_done(number)


class Processes:
    """So many processes of this machine."""

    def __init__(self, count: int):
        self._count = count

    def run(self, stage: Stage, job: Job, numbers: Sequence[int], bar: tqdm, on_done: OnDone) -> None:
        """See `Runner`."""
        if len(numbers) == 1:
            return InProcess().run(stage, job, numbers, bar, on_done)
        ticks, waiting, running = multiprocessing.get_context("spawn").Value("q", 0), list(reversed(numbers)), {}
        pool = process_pool(min(self._count, len(numbers)), _begin, stage, job, ticks)
        start = bar.n
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self._count:
                    number = waiting.pop()
                    running[pool.submit(_run, number)] = number
                done, _ = wait(running, _POLL, FIRST_COMPLETED)
                bar.update(start + ticks.value - bar.n)
                for future in done:
                    future.result()
                    on_done(running.pop(future))
        except BrokenProcessPool as error:
            raise UserError(
                "a process has died: what it said stands above; if it said nothing, memory was probably short: "
                "use fewer --processes; the same command goes on from here"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class Beam:
    """The workers of an Apache Beam runner, which need the packages of this project and see its folders.

    Args:
      arguments: Beam's own, as on a command line: "--runner=FlinkRunner --flink_master=HOST:8081".

    Raises:
      UserError: Apache Beam is not installed.
    """

    def __init__(self, arguments: str):
        try:
            from apache_beam.options.pipeline_options import PipelineOptions
        except ModuleNotFoundError as error:
            raise UserError(f"--beam needs Apache Beam ({error}): pip install 'apache-beam>=2.70'") from error
        self._options = PipelineOptions(shlex.split(arguments))

    def run(self, stage: Stage, job: Job, numbers: Sequence[int], bar: tqdm, on_done: OnDone) -> None:
        """See `Runner`."""
        import apache_beam as beam

        try:
            with beam.Pipeline(options=self._options) as pipeline:
                ranges = pipeline | beam.Create(numbers) | beam.Reshuffle()
                ranges | stage.name >> beam.Map(functools.partial(_run_in_beam, stage, job))
        except Exception as error:  # whatever a worker raised, as a runner wraps it
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise UserError(f"the Beam pipeline failed, its log stands above: {reason[0]}") from error
        for number in numbers:
            bar.update(len(job.range(number)))
            on_done(number)


def _run_in_beam(stage: Stage, job: Job, number: int) -> None:
    stage.run(job, number, lambda: None)


_work: Callable[[int], None]  # of a worker process


def _begin(stage: Stage, job: Job, ticks: Synchronized) -> None:
    """Set a worker process up. It ends at Ctrl-C: what it was at is begun anew."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def tick() -> None:
        with ticks.get_lock():
            ticks.value += 1

    _work = functools.partial(stage.run, job, tick=tick)


def _run(number: int) -> None:
    _work(number)
