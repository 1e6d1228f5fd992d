"""The training loop: it takes steps and calls hooks. What happens now and then is a hook's affair (hooks.py)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from clip_jax.parallel import Partitioner
from clip_jax.training.clock import INPUT, Clock
from clip_jax.training.state import TrainState

HostBatch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """A step that has been taken.

    Attributes:
      number: counted from 1.
      state: after it.
      metrics: of it, on the devices, which may still be computing them.
      last: whether it is the last of the run.
    """

    number: int
    state: TrainState
    metrics: Mapping[str, jax.Array]
    last: bool


class Hook:
    """What is called as a run goes on. A hook overrides the methods it needs."""

    def start(self, state: TrainState) -> None:
        """Before the first step."""

    def step(self, step: Step) -> bool | None:
        """After every step; true if the run is to end with it, which the hooks after this one are told."""

    def end(self) -> None:
        """When the run ends, also by an exception."""


def every(steps: int, hook: Hook) -> Hook:
    """`hook`, called after every so many steps and after the last one."""
    return _Every(steps, hook)


class _Every(Hook):
    def __init__(self, steps: int, hook: Hook):
        self._steps, self._hook = steps, hook
        self.start, self.end = hook.start, hook.end

    def step(self, step: Step) -> bool | None:
        return self._hook.step(step) if step.last or step.number % self._steps == 0 else None


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
    batches: Iterator[Any],
    total_steps: int,
    hooks: Sequence[Hook],
    clock: Clock,
) -> TrainState:
    """Run from `state.step` to `total_steps`, or until a hook ends the run; returns the last state.

    Args:
      state: fresh or restored.
      train_step: from `make_train_step`.
      batches: global batches on the devices, from step `state.step` on.
      total_steps: of the whole run.
      hooks: called in this order after each step, and closed in reverse order.
      clock: of the run; it learns what is input and what is compilation.
    """
    with ExitStack() as ends:
        for hook in hooks:
            hook.start(state)
            ends.callback(hook.end)
        ends.enter_context(clock.stepping())
        for number in range(int(state.step) + 1, total_steps + 1):
            with clock.during(INPUT):
                batch = next(batches)
            state, metrics = clock.take(train_step, state, batch)
            step = Step(number, state, metrics, last=number == total_steps)
            for hook in hooks:
                step = replace(step, last=bool(hook.step(step)) or step.last)
            if step.last:
                break
    return state


def on_devices(batches: Iterator[HostBatch], partitioner: Partitioner) -> Iterator[dict[str, jax.Array]]:
    """Global batches from each host's share of them."""
    return (to_devices(batch, partitioner) for batch in batches)


def to_devices(batch: HostBatch, partitioner: Partitioner) -> dict[str, jax.Array]:
    """A global batch from this host's share of it."""
    sharding = partitioner.batch_sharding
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
