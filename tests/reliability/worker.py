"""A run of 12 steps that ends itself where it is told to: `python -m tests.reliability.worker WORKDIR JSON`.

The JSON object says
  devices: how many virtual devices; 8 by default
  kill: name of the moment at which the process kills itself, one of MOMENTS or "after SECONDS"
  count: at which time of coming by, from 1
  signal: what it sends itself; SIGKILL by default
  logs: folder of the batches' logs; by default the workdir
  config: changed fields of the run's configuration
  coordinator, processes, index: where it is one of several processes
"""

import functools
import json
import os
import shutil
import signal
import sys
import threading
import zlib
from pathlib import Path

import jax
from orbax.checkpoint._src.path import deleter

from clip_jax import cli
from clip_jax.data.pipeline import TrainBatches
from clip_jax.distributed import initialize
from clip_jax.training import checkpoints, lock, manifest, run, run_config
from clip_jax.training.metrics import MetricsWriter
from tests.training.test_run import config_of

STEPS = 12


def main(workdir: str, order: dict) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", order.get("devices", 8))
    if order.get("processes", 1) > 1:
        initialize(order["coordinator"], order["processes"], order["index"])
    moment = order.get("kill", "")
    if moment.startswith("after "):
        threading.Timer(float(moment.removeprefix("after ")), end, [order]).start()
    elif moment:
        MOMENTS[moment](functools.partial(end, order), count=order.get("count", 1))
    LoggedBatches.folder, run.TrainBatches = order.get("logs", workdir), LoggedBatches
    config = {"total_steps": STEPS, "log_every": 1, "checkpoint_every": 3, **order.get("config", {})}
    run.run(config_of(**config), workdir)


def end(order: dict) -> None:
    os.kill(os.getpid(), getattr(signal, order.get("signal", "SIGKILL")))


class LoggedBatches(TrainBatches):
    """Appends "STEP ROW CHECKSUM" of each sample to batches-PROCESS.log."""

    folder = ""

    def __init__(self, reader, config, start_step, process_index, process_count):
        super().__init__(reader, config, start_step, process_index, process_count)
        self._number, self._process = start_step, process_index

    def __next__(self):
        batch = super().__next__()
        self._number += 1
        first = self._process * len(batch["image"])
        with open(f"{self.folder}/batches-{self._process}.log", "a") as file:
            for row, (image, text) in enumerate(zip(batch["image"], batch["text"], strict=True), first):
                file.write(f"{self._number} {row} {zlib.crc32(text.tobytes(), zlib.crc32(image.tobytes())):08x}\n")
        return batch


def before(owner, name, done=False):
    """A moment: when `owner.name` is called for the count-th time, before it does anything, or when it is done."""

    def arm(kill, count):
        true, calls = getattr(owner, name), []

        @functools.wraps(true)
        def armed(*arguments, **keywords):
            calls.append(name)
            due = len(calls) == count
            if due and not done:
                kill()
            result = true(*arguments, **keywords)
            if due and done:
                kill()
            return result

        setattr(owner, name, armed)

    return arm


after = functools.partial(before, done=True)


def half_written(owner, name):
    """A moment: when half of a small file is written."""

    def arm(kill, count):
        calls = []

        def armed(path, text):
            calls.append(name)
            part = path.with_name(path.name + ".part")
            part.write_text(text[: len(text) // 2] if len(calls) == count else text)
            if len(calls) == count:
                kill()
            part.replace(path)

        setattr(owner, name, armed)

    return arm


def half_a_line(kill, count):
    true, calls = MetricsWriter._append, []

    def armed(self, line):
        calls.append(line)
        true(self, line[: len(line) // 2] if len(calls) == count else line)
        if len(calls) == count:
            kill()

    MetricsWriter._append = armed


def half_deleted(kill, count):
    calls = []

    def armed(self, path, **_):
        calls.append(path)
        for number, file in enumerate(sorted(each for each in Path(path).rglob("*") if each.is_file())):
            if len(calls) == count and number == 5:
                kill()
            file.unlink()
        shutil.rmtree(path)

    deleter.PathDeleter.delete = armed


def moments():
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.handlers import pytree_checkpoint_handler
    from orbax.checkpoint._src.path import atomicity

    manager, renamed = ocp.CheckpointManager, atomicity.AtomicRenameTemporaryPath
    return {
        "before a save": before(manager, "save"),
        "save under way": after(manager, "save"),
        "temporary folder": after(renamed, "create"),
        "arrays begun": before(pytree_checkpoint_handler.PyTreeCheckpointHandler, "finalize"),
        "all written": before(checkpoints, "write_manifest"),
        "half the list of files": half_written(manifest, "write_whole"),
        "before the commit": before(renamed, "finalize"),
        "committed": before(manager, "_finalize_checkpoint"),
        "half an old one deleted": half_deleted,
        "half a line of metrics": half_a_line,
        "half the configuration": half_written(run_config, "write_whole"),
        "lock taken": after(lock.Lock, "_take"),
        "restoring": before(checkpoints.Checkpoints, "_arrays"),
        "batch": before(LoggedBatches, "__next__"),
    }


MOMENTS = moments()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    cli.run(lambda _: main(arguments[0], json.loads(arguments[1])))
