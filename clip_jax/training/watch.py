"""The alarm for a run that hangs: what it was about, and what each of its threads is doing."""

import logging
import sys
import threading
import time
import traceback

import jax

from clip_jax.training.clock import INPUT, STEPS, Clock
from clip_jax.training.loop import Hook, Step
from clip_jax.training.state import TrainState

logger = logging.getLogger(__name__)

_PATIENCE = 10  # times as long may compilation, a checkpoint or an evaluation take


class Watch(Hook):
    """Warn once when the run has not moved for so long; the run itself is left alone.

    Args:
      clock: knows when the run last moved, and what it is doing.
      seconds: in which a step, or the input of one, should be done; ten times as long is allowed for anything else.
    """

    def __init__(self, clock: Clock, seconds: float):
        self._clock, self._seconds = clock, seconds
        self._ended = threading.Event()

    def start(self, state: TrainState) -> None:
        self._number = int(state.step)
        self._thread = threading.Thread(target=self._watch, name="clip_jax-watch", daemon=True)
        self._thread.start()

    def step(self, step: Step) -> None:
        self._number = step.number

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        alarmed_at = None
        while not self._ended.wait(self._seconds / 10):
            phase, moved = self._clock.phase, self._clock.moved
            allowed = self._seconds * (1 if phase in (STEPS, INPUT) else _PATIENCE)
            still = time.perf_counter() - moved
            if still > allowed and moved != alarmed_at:
                alarmed_at = moved
                logger.warning(
                    "process %d has not moved for %.0f s (phase: %s, after step %d); its threads:\n%s",
                    jax.process_index(), still, phase, self._number, _stacks(),
                )  # fmt: skip


def _stacks() -> str:
    """Where each thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
        if number != threading.get_ident()
    )
