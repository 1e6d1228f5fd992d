"""Ending a run early, when the platform or the user asks: all processes save the same step and end."""

import logging
import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from clip_jax.errors import RunStopped
from clip_jax.training.hooks import Save
from clip_jax.training.loop import Hook, Step
from clip_jax.training.state import TrainState

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption(Hook):
    """After SIGTERM or Ctrl-C, save the step that is being taken and stop with the exit code of that signal.

    With several processes, JAX's preemption service hears SIGTERM on any of them and agrees on the step; Ctrl-C is
    passed on to it. Another signal ends the process at once.
    """

    def __init__(self, save: Save):
        self._save = save
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def start(self, state: TrainState) -> None:
        if jax.process_count() == 1:
            self._before = {each: signal.signal(each, self._ask) for each in SIGNALS}
        else:
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._pass_on)}

    def step(self, step: Step) -> None:
        if not self._is_time(step.number) or step.last:
            return
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        saved = self._save.now(step)
        asked = self._asked or signal.SIGTERM
        what = "nothing is saved" if saved is None else f"step {saved} is saved"
        raise RunStopped(
            f"stopped by {asked.name}; {what}: run the same command again to go on",
            exit_code=128 + asked,
        )

    def end(self) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)

    def _is_time(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._asked is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        logger.info("%s: saving after this step; once more ends at once", self._asked.name)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
