"""The training loop: it owns the step number, feeds batches, and reports what comes back."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from clip_jax.parallel import batch_sharding
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.metrics import MetricsWriter
from clip_jax.training.state import TrainState

HostBatch = Mapping[str, np.ndarray]
Evaluate = Callable[[TrainState], Mapping[str, float]]


@dataclass(frozen=True)
class LoopConfig:
    """How long, and what happens every so many steps."""

    total_steps: int
    batch_size: int
    log_every: int
    eval_every: int
    checkpoint_every: int


def train(
    state: TrainState,
    train_step: Callable,
    batches: Iterator[HostBatch],
    config: LoopConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    writer: MetricsWriter | None,
    learning_rate: Callable[[int], float],
    evaluate: Evaluate | None,
) -> TrainState:
    """Run from `state.step` to `total_steps`; returns the last state.

    Args:
      state: fresh or restored.
      train_step: from `make_train_step`.
      batches: this host's share of the global batches, from step `state.step` on.
      config: durations.
      mesh: where the batch goes.
      checkpoints: where the state goes, every `checkpoint_every` steps and at the end.
      writer: where metrics go; None on hosts that do not write.
      learning_rate: the schedule, for the log.
      evaluate: called every `eval_every` steps and at the end; its values are logged as they come.
    """
    start = int(state.step)
    log = _Log(config, start, writer, learning_rate)
    for step in range(start + 1, config.total_steps + 1):
        batch = to_devices(next(batches), mesh)
        state, metrics = train_step(state, batch)
        # The metrics of the step before are ready by now: reading them does not hold up the devices.
        log.step(step, metrics)
        last = step == config.total_steps
        if last or step % config.eval_every == 0 or step % config.checkpoint_every == 0:
            log.flush()
            if last or step % config.checkpoint_every == 0:
                checkpoints.save(step, state)
            if evaluate is not None and (last or step % config.eval_every == 0):
                log.evaluation(step, evaluate(state))
    log.close()
    return state


def to_devices(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from each host's share of the batch."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


class _Log:
    """Progress bar and metric lines, one step behind the devices."""

    def __init__(self, config: LoopConfig, start: int, writer: MetricsWriter | None, learning_rate: Callable):
        self._config, self._writer, self._learning_rate = config, writer, learning_rate
        self._began = self._marked = time.perf_counter()
        self._marked_step, self._pending = start, None
        self._bar = tqdm(
            total=config.total_steps,
            initial=start,
            desc="training",
            unit="step",
            disable=writer is None,
            mininterval=0.2 if sys.stderr.isatty() else 20,
            bar_format="{desc} {n}/{total} |{bar:20}| {remaining} left{postfix}",
        )

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Note the metrics of `step`, write those of the step before."""
        self.flush()
        if step % self._config.log_every == 0 or step in (1, self._config.total_steps):
            self._pending = step, metrics
        self._bar.update()

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        rate = (step - self._marked_step) * self._config.batch_size / (now - self._marked)
        self._marked, self._marked_step = now, step
        if self._writer is None:
            return
        self._writer.write(
            step,
            {
                **values,
                "learning_rate": float(self._learning_rate(step - 1)),
                "examples_per_second": rate,
                "seconds": now - self._began,
            },
        )
        temperature = np.exp(-values["logit_scale"])
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, temperature {temperature:.4f}, {rate:,.0f} examples/s", refresh=False
        )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of an evaluation, whose time does not count as training."""
        if self._writer is not None:
            self._writer.write(step, values)
            self._bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()), file=sys.stderr)
        self._marked, self._marked_step = time.perf_counter(), step

    def close(self) -> None:
        """Write what is left and end the bar."""
        self.flush()
        self._bar.close()
