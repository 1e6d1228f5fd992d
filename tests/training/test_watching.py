"""Where the time goes, by a clock of the test's own; the alarm for a run that hangs, by a run that does."""

import logging
import threading
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from clip_jax.training import clock as clock_module
from clip_jax.training.clock import CHECKPOINT, EVALUATION, INPUT, Clock
from clip_jax.training.loop import train
from clip_jax.training.state import TrainState
from clip_jax.training.watch import Watch

STATE = TrainState(jnp.int32(0), {}, {}, (), None)
DEADLINE = 60  # seconds, for what takes a fraction of one


class Time:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def passes(self, seconds):
        self.now += seconds


class Result:
    """What a step gives: ready when it is told to be."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        assert self.ready.wait(DEADLINE)


def finish(clock, result):
    """Let the step in flight end now, and wait until the clock has seen it."""
    result.ready.set()
    wait_until(lambda: clock._taken == clock._finished)


def wait_until(condition):
    for _ in range(DEADLINE * 1000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it did not happen")


def test_phases_cost_what_the_devices_stand_still_for(monkeypatch):
    now, results = Time(monkeypatch), [Result() for _ in range(3)]
    following = iter(results)

    def train_step(state, batch):
        now.passes(30.0 if batch == "first" else 0.0)
        return state, next(following)

    clock = Clock()
    now.passes(10.0)  # until the loop begins
    with clock.stepping():
        with clock.during(INPUT):
            now.passes(5.0)
        clock.take(train_step, STATE, "first")
        now.passes(4.0)
        finish(clock, results[0])
        with clock.during(CHECKPOINT):
            now.passes(6.0)
        clock.take(train_step, STATE, "second")
        with clock.during(EVALUATION):  # while the step is in flight throughout
            now.passes(8.0)
        with clock.during(INPUT):  # and for the first 2 of these 3 seconds
            now.passes(2.0)
            finish(clock, results[1])
            now.passes(1.0)
        now.passes(34.0)
    costs = {"restart": 10, "compile": 30, "input": 6, "checkpoint": 6, "evaluation": 0}
    assert clock.shares() == pytest.approx({"goodput": 0.48, **{f"time/{name}": n / 100 for name, n in costs.items()}})
    assert clock.summary() == (
        "100 s: 48.0% in steps, 10.0% in restart, 30.0% in compile, 6.0% in input, 6.0% in checkpoint"
    )


def test_what_fails_in_a_phase_counts_and_leaves_it(monkeypatch):
    now, clock = Time(monkeypatch), Clock()
    with pytest.raises(ValueError, match="no space"), clock.during(CHECKPOINT):
        now.passes(3.0)
        raise ValueError("no space")
    assert clock.phase == "steps" and clock.shares()["time/checkpoint"] == 1.0


def test_a_stalled_input_raises_one_alarm_with_stacks(caplog):
    def alarms(step):
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if f"(phase: input, after step {step})" in message]

    def batches():
        yield "first"
        wait_until(lambda: alarms(step=1))
        time.sleep(0.2)  # still no step, but it has been said
        yield "second"
        wait_until(lambda: alarms(step=2))
        yield "third"

    with caplog.at_level(logging.WARNING, "clip_jax"):
        clock = Clock()
        train(STATE, lambda state, batch: (state, {}), batches(), 3, [Watch(clock, seconds=0.1)], clock)
    [alarm] = alarms(step=1)
    assert "process 0 has not moved for" in alarm
    assert "thread MainThread:" in alarm and "in wait_until" in alarm
    assert len(alarms(step=2)) == 1


def test_a_step_that_hangs_raises_an_alarm_and_the_end_of_the_run_ends_the_watch(caplog):
    clock = Clock()
    watch = Watch(clock, seconds=0.1)
    watch.start(STATE)
    with caplog.at_level(logging.WARNING, "clip_jax"), clock.stepping():
        clock.take(lambda state, batch: (state, {}), STATE, None)
        wait_until(lambda: caplog.records)
    watch.end()
    assert "(phase: steps, after step 0)" in caplog.records[0].getMessage()
    assert not any(thread.name == "clip_jax-watch" for thread in threading.enumerate())


def test_compilation_checkpoints_and_evaluations_may_take_longer(caplog):
    clock = Clock()
    watch = Watch(clock, seconds=0.2)
    with caplog.at_level(logging.WARNING, "clip_jax"):
        watch.start(STATE)
        with clock.during(EVALUATION):
            wait_until(lambda: caplog.records)  # after ten times as long
        watch.end()
    [alarm] = caplog.records
    assert alarm.args[1] > 2.0 and "(phase: evaluation" in alarm.getMessage()
