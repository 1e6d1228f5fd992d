"""What happens now and then in a run: the log, checkpoints, evaluation."""

import logging
import sys
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from tqdm import tqdm

from clip_jax.data.damage import REASONS
from clip_jax.data.pipeline import TrainBatches
from clip_jax.distributed import sum_over_hosts
from clip_jax.training.checkpoints import Checkpoints
from clip_jax.training.clock import CHECKPOINT, EVALUATION, Clock
from clip_jax.training.lock import Lock
from clip_jax.training.loop import Hook, Step
from clip_jax.training.metrics import MetricsWriter
from clip_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class Log(Hook):
    """The progress bar and the metrics of every so many steps, read one step behind the devices.

    Args:
      writer: where metrics go; None on hosts that do not write.
      log_every: steps.
      total_steps: of the whole run.
      batch_size: global.
      learning_rate: the schedule.
      batches: the input, for the time spent waiting for it and the damage in it.
      clock: for the shares of the time.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        log_every: int,
        total_steps: int,
        batch_size: int,
        learning_rate: Callable[[int], float],
        batches: TrainBatches,
        clock: Clock,
    ):
        self._writer, self._log_every, self._batch_size = writer, log_every, batch_size
        self._total_steps, self._learning_rate = total_steps, learning_rate
        self._batches, self._clock = batches, clock
        self._pending: Step | None = None
        self._damage: dict[str, int] = {}

    def start(self, state: TrainState) -> None:
        self._marked_step = int(state.step)
        self._began = self._marked = time.perf_counter()
        self._marked_wait = self._batches.waited
        if self._marked_step < self._total_steps:
            logger.info("compiling the train step: the first one takes a while, minutes for a large model")
        self._bar = tqdm(
            total=self._total_steps,
            initial=self._marked_step,
            desc="training",
            unit="step",
            disable=self._writer is None,
            mininterval=0.2 if sys.stderr.isatty() else 20,
            bar_format="{desc} {n}/{total} |{bar:20}| {remaining} left{postfix}",
        )

    def step(self, step: Step) -> None:
        # The metrics of the step before are ready by now: reading them does not hold up the devices.
        self.flush()
        if step.number % self._log_every == 0 or step.number == 1 or step.last:
            self._pending = step
            if self._batches.skips:  # here, where all hosts come by: when one of them ends, the others do not answer
                total = sum_over_hosts([self._batches.damage[reason] for reason in REASONS])
                self._damage = {f"damaged/{reason}": n for reason, n in zip(REASONS, total, strict=True) if n}
        self._bar.update()

    def flush(self) -> None:
        """Write what is pending, before anything else is said or saved about that step."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        values = {key: value.item() for key, value in jax.device_get(step.metrics).items()}
        now = time.perf_counter()
        rate = (step.number - self._marked_step) * self._batch_size / (now - self._marked)
        waited = (self._batches.waited - self._marked_wait) / (now - self._marked)
        self._mark(now, step.number)
        # Of the newest update: the schedule counts updates, of which skipped steps make none.
        learning_rate = float(self._learning_rate(step.number - values["skipped"] - 1))
        timing = {"examples_per_second": rate, "data_wait_fraction": waited, "seconds": now - self._began}
        timing |= self._clock.shares()
        if self._writer is not None:
            self._writer.write(step.number, {**values, "learning_rate": learning_rate, **timing, **self._damage})
        temperature = np.exp(-values["logit_scale"])
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, temperature {temperature:.4f}, {rate:,.0f} examples/s", refresh=False
        )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of an evaluation, whose time does not count as training."""
        if self._writer is not None:
            self._writer.write(step, values)
            logger.info("step %d: %s", step, ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
        self._mark(time.perf_counter(), step)

    def _mark(self, now: float, step: int) -> None:
        """Begin to measure the time of the next steps."""
        self._marked, self._marked_step, self._marked_wait = now, step, self._batches.waited

    def end(self) -> None:
        try:
            self.flush()
        finally:
            self._bar.close()
            logger.info("%s", self._clock.summary())
            if self._writer is not None:
                self._writer.close()


class Save(Hook):
    """Write a checkpoint every so many steps and after the last, when the log has written what belongs to it.

    Where that step was skipped it waits for the next accepted one: a series of skipped steps that ends a run must not
    push out the checkpoints of before.
    """

    def __init__(self, checkpoints: Checkpoints, steps: int, log: Log, clock: Clock):
        self._checkpoints, self._steps, self._log, self._clock = checkpoints, steps, log, clock
        self._due = False

    def step(self, step: Step) -> None:
        self._due |= step.number % self._steps == 0
        if step.last or (self._due and not int(step.metrics["skipped_in_a_row"])):
            self._write(step)

    def now(self, step: Step) -> int | None:
        """Write a checkpoint and wait until it is complete; returns the newest step that is saved, None without one."""
        self._write(step)
        with self._clock.during(CHECKPOINT):
            self._checkpoints.wait()
        return self._checkpoints.latest_step()

    def _write(self, step: Step) -> None:
        self._due = False
        self._log.flush()
        with self._clock.during(CHECKPOINT):
            self._checkpoints.save(step.number, step.state)


class Hold(Hook):
    """See, before anything is written about a step, that the workdir is still this run's."""

    def __init__(self, lock: Lock):
        self._lock = lock

    def step(self, step: Step) -> None:
        self._lock.check()


class Evaluate(Hook):
    """Measure the state, and log what comes back under its own keys.

    Args:
      evaluate: what measures.
      log: where it goes.
      clock: of the run.
      before: whether to measure what a run starts with as well, as its step 0.
    """

    def __init__(
        self, evaluate: Callable[[TrainState], Mapping[str, float]], log: Log, clock: Clock, before: bool = False
    ):
        self._evaluate, self._log, self._clock, self._before = evaluate, log, clock, before

    def start(self, state: TrainState) -> None:
        if self._before and not int(state.step):
            self._measure(0, state)

    def step(self, step: Step) -> None:
        self._log.flush()
        self._measure(step.number, step.state)

    def _measure(self, number: int, state: TrainState) -> None:
        with self._clock.during(EVALUATION):
            values = self._evaluate(state)
        self._log.evaluation(number, values)
