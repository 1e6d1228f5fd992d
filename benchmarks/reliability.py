"""What it costs that a run watches its numbers and its time: a step with all of it against a step with none.

    python -m benchmarks.reliability [CONFIG:BATCH:STEPS ...]

Trains each config on one batch that lies on the devices already, by turns with the guard compiled in and the hooks
`BadNumbers` and `Watch` and the clock around it, and with none of them; prints the fastest round of each (others of
the machine's users slow some down). Then saves checkpoints, by turns with digests and without, and sees how long it
takes until a next step, which takes the state's memory over, is done. Writes both to benchmarks/results/reliability.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.machine import cpu
from clip_jax.cli import load_config
from clip_jax.platform import keep_libtpu_quiet
from clip_jax.training import checkpoints as checkpoints_module
from clip_jax.training import step as step_module
from clip_jax.training.bad_numbers import BadNumbers
from clip_jax.training.checkpoints import Checkpoints, is_finite
from clip_jax.training.clock import Clock
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.loop import to_devices, train
from clip_jax.training.manifest import file_names, write_manifest
from clip_jax.training.state import Training, TrainState, initial_state
from clip_jax.training.step import make_train_step
from clip_jax.training.watch import Watch
from clip_jax.workdir import CHECKPOINTS

RESULTS = Path(__file__).parent / "results" / "reliability.md"
JOBS = ("demo:128:10", "vit_b32:16:2")
ROUNDS = 12
SAVES = 6


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="CONFIG:BATCH:STEPS", default=JOBS)
    keep_libtpu_quiet()
    jobs = parser.parse_args().jobs
    rows = [row(*job.split(":")) for job in jobs]
    lines = [
        "# What watching costs",
        "",
        f"`python -m benchmarks.reliability {' '.join(jobs)}` on {cpu()}; jax {jax.__version__}.",
        f"The fastest of {ROUNDS} rounds each, by turns.",
        "",
        "| config | batch | steps a round | ms a step, with none | with all | more |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        f"What a checkpoint costs, the fastest of {SAVES} each, by turns: until all is written; until the next step is",
        "done, without digests and with; in that the look for numbers that are not finite; in the background the list",
        "of files.",
        "",
        "| config | GiB | s in all | s until the next step, without | with digests | more, of all | s for the look | "
        "s for the list |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *[saving_row(name) for name in ("demo", "vit_b32")],
    ]
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


def row(name: str, batch_size: str, steps: str) -> str:
    """One line of the table."""
    config = load_config(name, {"batch_size": batch_size})
    training = make_training(config)
    batch, count = synthetic_batch(config, training), int(steps)
    with unguarded():
        bare = Steps(training, batch, count, in_a_bare_loop)
    watched = Steps(training, batch, count, in_a_watched_loop)
    pairs = [(bare.seconds(), watched.seconds()) for _ in range(ROUNDS)]
    without, with_all = (1000 * min(times) for times in zip(*pairs, strict=True))
    more = with_all / without - 1
    return f"| {name} | {batch_size} | {steps} | {without:.2f} | {with_all:.2f} | {more:+.2%} |"


class Steps:
    """A state that goes on for so many steps at a time, timed; made, compiled and warmed up at once."""

    def __init__(self, training: Training, batch: dict, count: int, loop: Callable):
        self._batch, self._count, self._loop = batch, count, loop
        self._train_step, self._state = make_train_step(training), initial_state(training, seed=0)
        self.seconds()

    def seconds(self) -> float:
        """Of one step, the mean of a round."""
        self._state = self._state.replace(step=jnp.zeros_like(self._state.step))
        began = time.perf_counter()
        self._state = jax.block_until_ready(self._loop(self._state, self._train_step, repeat(self._batch), self._count))
        return (time.perf_counter() - began) / self._count


def in_a_bare_loop(state, train_step, batches, count):
    """Nothing but steps."""
    for _ in range(count):
        state, _ = train_step(state, next(batches))
    return state


def in_a_watched_loop(state, train_step, batches, count):
    """The project's loop, with what watches it."""
    clock = Clock()
    hooks = [BadNumbers(10, checkpoints=None, report=None), Watch(clock, seconds=600)]
    return train(state, train_step, batches, count, hooks, clock)


def saving_row(name: str) -> str:
    """One line of the table of what a checkpoint costs."""
    config = load_config(name)
    with tempfile.TemporaryDirectory() as workdir, closing(Checkpoints(workdir, config)) as checkpoints:
        saves = Saves(checkpoints, noise_like(initial_state(make_training(config), seed=0)))
        pairs = [(saves.without_digests(), saves.seconds()) for _ in range(SAVES)]
        folder = epath.Path(workdir) / CHECKPOINTS / str(checkpoints.latest_step())
        listing = seconds(lambda: write_manifest(folder))
        size = sum((folder / file).stat().length for file in file_names(folder)) / 2**30
    without, held = (min(held for held, _ in each) for each in zip(*pairs, strict=True))
    whole = min(whole for _, (_, whole) in pairs)
    look = min(seconds(lambda: bool(is_finite(saves.state))) for _ in range(SAVES))
    more = (held - without) / whole
    return (
        f"| {name} | {size:.2f} | {whole:.2f} | {without:.3f} | {held:.3f} | {more:+.1%} | {look:.3f} | {listing:.2f} |"
    )


class Saves:
    """A state that is saved and then taken over by what stands for the next step, timed; all is compiled at once."""

    def __init__(self, checkpoints: Checkpoints, state: TrainState):
        self._checkpoints, self.state, self._number = checkpoints, state, 0
        self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Until the next step is done, and until the checkpoint is complete."""
        self._number += 1
        began = time.perf_counter()
        self._checkpoints.save(self._number, self.state)
        self.state = jax.block_until_ready(next_state(self.state))
        held = time.perf_counter() - began
        self._checkpoints.wait()
        return held, time.perf_counter() - began

    def without_digests(self) -> tuple[float, float]:
        """The same."""
        with mock.patch.object(checkpoints_module, "start_digests", lambda tree: dict):
            return self.seconds()


@partial(jax.jit, donate_argnums=0)
def noise_like(state: TrainState) -> TrainState:
    """Moments of zero would be compressed to nothing when they are saved."""
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noise = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


@partial(jax.jit, donate_argnums=0)
def next_state(state: TrainState) -> TrainState:
    """Stands for a train step, which reuses the old state's memory."""
    return jax.tree.map(lambda leaf: leaf + 1, state)


def seconds(action: Callable[[], object]) -> float:
    """That an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextmanager
def unguarded() -> Iterator[None]:
    """Train steps made within it accept everything unseen."""
    accept_all = mock.patch.object(step_module, "accepts", lambda *_: jnp.array(True))
    with accept_all, mock.patch.object(jax.lax, "cond", lambda accepted, new, old: new()):
        yield


def synthetic_batch(config: RunConfig, training: Training) -> dict[str, jax.Array]:
    """Noise and random words, on the devices."""
    generator, text = np.random.default_rng(0), config.model.text
    side = config.model.vision.image_resolution
    images = generator.integers(0, 256, (config.batch_size, side, side, 3), dtype=np.uint8)
    tokens = generator.integers(1, text.vocab_size, (config.batch_size, text.context_length), dtype=np.int32)
    return to_devices({"image": images, "text": tokens}, training.partitioner)


if __name__ == "__main__":
    main()
