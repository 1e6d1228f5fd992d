"""Contestants in processes of their own, which take turns."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from clip_jax.planner.topologies import GIB
from clip_jax.platform import keep_libtpu_quiet

Run = Callable[[], None]
Contestants = dict[str, Callable[[], Run]]  # what makes a run, in the contestant's own process


@dataclass(frozen=True)
class Turn:
    """So many runs before the clock is started, and so many after."""

    untimed: int
    timed: int


def race(contestants: Contestants, rounds: int, turn: Turn) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a run of every contestant in every round, and the most memory in GiB that its process ever held."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    try:
        for name, make in contestants.items():
            ends[name], far_end = context.Pipe()
            processes.append(context.Process(target=_contestant, args=(make, turn, far_end)))
            processes[-1].start()
            ends[name].recv()  # one after the other: getting ready takes all cores
        seconds, memory = {name: [] for name in contestants}, {}
        for _ in range(rounds):
            for name, end in ends.items():
                end.send("run")
                elapsed, memory[name] = end.recv()
                seconds[name].append(elapsed)
        return seconds, memory
    finally:  # no daemons, which may have no worker processes
        for process in processes:
            process.terminate()


def _contestant(make: Callable[[], Run], turn: Turn, end: Connection) -> None:
    """In a process of its own: get ready (compile), then take a turn when told to, and report."""
    keep_libtpu_quiet()
    run = make()
    for _ in range(turn.untimed):
        run()
    end.send("ready")
    while end.recv() == "run":
        for _ in range(turn.untimed):
            run()
        start = time.perf_counter()
        for _ in range(turn.timed):
            run()
        elapsed = (time.perf_counter() - start) / turn.timed
        end.send((elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB))
