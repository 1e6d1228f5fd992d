"""Where a run's numbers go: WORKDIR/metrics.jsonl and TensorBoard events beside it."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from clip_jax.training.storage import storage
from clip_jax.workdir import METRICS, absolute, split_metrics, write_whole

logger = logging.getLogger(__name__)

DAMAGED_METRICS = "metrics.damaged"


class MetricsWriter:
    """One JSON object per line, written at once. Only the process that writes logs makes one.

    A resumed run repeats the steps after its checkpoint: what an earlier life wrote about them is dropped first,
    so that every step has one line. Damaged lines are moved to metrics.damaged.

    Args:
      workdir: of the run.
      start_step: with which the run goes on.
      check: called before anything is written; raises if the workdir is another run's by now.

    Raises:
      RunStopped: the disk or bucket refuses to be written to; later as well.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, check: Callable[[], None]):
        root = absolute(workdir)
        self._path, self._check = root / METRICS, check
        with storage("write", self._path):
            lines, damaged = split_metrics(workdir)
            if damaged:
                _set_aside(damaged, root / DAMAGED_METRICS)
            kept = [line for line in lines if line["step"] <= start_step] if start_step else []  # a fresh run has none
            self._text = "".join(map(_to_line, kept))
            write_whole(self._path, self._text)
            self._events = _Events(root, start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, and the same values as TensorBoard scalars; what is not finite is left out of both."""
        self._check()
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        with storage("write", self._path):
            self._append(_to_line({"step": step, **metrics}))
            self._events.write(step, metrics)

    def _append(self, line: str) -> None:
        if "://" in str(self._path):  # objects in buckets cannot grow
            self._text += line
            self._path.write_text(self._text)
            return
        with self._path.open("a") as file:
            file.write(line)

    def close(self) -> None:
        """Close the file of events."""
        self._events.close()


class _Events:
    """TensorBoard's file of events. In a bucket, where files cannot grow, it is a copy of a local one."""

    def __init__(self, root: epath.Path, start_step: int):
        self._bucket = root if "://" in str(root) else None
        self._local = tempfile.TemporaryDirectory() if self._bucket else nullcontext(str(root))
        self._folder = self._local.__enter__()
        # Not SummaryWriter: its thread dies of a full disk, and whoever writes after that waits for ever.
        self._writer = EventsWriter(f"{self._folder}/events")
        restart = SessionLog(status=SessionLog.START)  # what an earlier life wrote about later steps is void
        self._writer.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=restart))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            summary = scalar(key if "/" in key else f"train/{key}", value)
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()
        if self._bucket:
            for file in Path(self._folder).iterdir():
                (self._bucket / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            logger.warning("the last events for TensorBoard are lost: %s", error)
        self._local.__exit__(None, None, None)


def _set_aside(lines: Sequence[str], path: epath.Path) -> None:
    """Add damaged lines to a file of their own."""
    logger.warning("%d damaged lines of %s; moved to %s", len(lines), METRICS, path)
    before = path.read_text() if path.exists() else ""
    write_whole(path, before + "".join(f"{line}\n" for line in lines))


def _to_line(values: Mapping[str, int | float]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"
