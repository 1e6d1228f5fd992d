"""Where a run's time goes: into steps, or into what the devices stand still for."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import jax

from clip_jax.training.state import TrainState

RESTART, COMPILE, INPUT, CHECKPOINT, EVALUATION = "restart", "compile", "input", "checkpoint", "evaluation"
PHASES = (RESTART, COMPILE, INPUT, CHECKPOINT, EVALUATION)
STEPS = "steps"


class Clock:
    """Measures the phases of one life of a run, from its start to the end of the process.

    The host works ahead of the devices, so a phase costs only what of it passes while no step is in flight. What no
    phase has cost is time in steps.

    Attributes:
      phase: the one of `PHASES` that the host is in, or `STEPS`.
      moved: when the run last went on: a step was finished, or a phase began or ended.
    """

    def __init__(self):
        self._began = self._idle_since = self.moved = time.perf_counter()
        self.phase, self._costs = RESTART, Counter()
        self._taken = self._finished = 0
        self._in_flight = queue.SimpleQueue()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens within it as `phase`."""
        began = self._enter(phase)
        try:
            yield
        finally:
            self._costs[phase] += max(0.0, self._enter(STEPS) - max(began, self._idle()))

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the loop over steps: all before it that was nothing else is the restart."""
        self._costs[RESTART] += self._enter(STEPS) - self._began - sum(self._costs.values())
        threading.Thread(target=self._follow, name="clip_jax-clock", daemon=True).start()
        try:
            yield
        finally:
            self._in_flight.put(None)

    def take(
        self, train_step: Callable[..., tuple[TrainState, Any]], state: TrainState, batch: Any
    ) -> tuple[TrainState, Any]:
        """What `train_step` returns; the first call compiles it."""
        with nullcontext() if self._taken else self.during(COMPILE):
            state, metrics = train_step(state, batch)
        self._taken += 1
        self._in_flight.put(metrics)
        return state, metrics

    def shares(self) -> dict[str, float]:
        """The share of the time so far in steps (`goodput`) and in each phase (`time/PHASE`); they add up to 1."""
        total = time.perf_counter() - self._began
        costs = {f"time/{phase}": self._costs[phase] / total for phase in PHASES}
        return {"goodput": 1 - sum(costs.values()), **costs}

    def summary(self) -> str:
        """The shares in words: "12 s: 80.0% in steps, 20.0% in compile"."""
        shares = self.shares()
        words = [f"{shares['goodput']:.1%} in steps"]
        words += [f"{shares[f'time/{phase}']:.1%} in {phase}" for phase in PHASES if self._costs[phase]]
        return f"{time.perf_counter() - self._began:,.0f} s: {', '.join(words)}"

    def _enter(self, phase: str) -> float:
        self.phase, self.moved = phase, time.perf_counter()
        return self.moved

    def _idle(self) -> float:
        """Since when the devices have been idle: now, if a step is in flight."""
        return self._idle_since if self._taken == self._finished else time.perf_counter()

    def _follow(self) -> None:
        """Note when each step is finished; if one fails, the loop meets the same error."""
        with suppress(jax.errors.JaxRuntimeError):
            for metrics in iter(self._in_flight.get, None):
                jax.block_until_ready(metrics)
                self._idle_since = self.moved = time.perf_counter()
                self._finished += 1
