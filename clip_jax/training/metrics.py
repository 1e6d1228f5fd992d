"""Where a run's numbers go: WORKDIR/metrics.jsonl and TensorBoard events beside it."""

import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from etils import epath
from tensorboardX import SummaryWriter

from clip_jax.errors import RunStopped
from clip_jax.workdir import METRICS, absolute, split_metrics, write_whole

logger = logging.getLogger(__name__)

DAMAGED_METRICS = "metrics.damaged"


class MetricsWriter:
    """One JSON object per line, written at once. Only the process that writes logs makes one.

    A resumed run repeats the steps after its checkpoint: what an earlier life wrote about them is dropped first,
    so that every step has one line. Damaged lines are moved to metrics.damaged.
    """

    def __init__(self, workdir: str, start_step: int):
        root = absolute(workdir)
        root.mkdir(parents=True, exist_ok=True)
        self._path = root / METRICS
        lines, damaged = split_metrics(workdir)
        if damaged:
            logger.warning("%s had %d damaged lines; moved to %s", self._path, len(damaged), root / DAMAGED_METRICS)
            write_whole(root / DAMAGED_METRICS, "".join(f"{line}\n" for line in damaged))
        self._text = "".join(_to_line(line) for line in lines if line["step"] <= start_step)
        write_whole(self._path, self._text)
        self._events = _Events(root, start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and the same values as TensorBoard scalars.

        Raises:
          RunStopped: the disk or bucket refuses it.
        """
        line = _to_line({"step": step, **metrics})
        try:
            self._append(line)
            self._events.write(step, metrics)
        except OSError as error:
            raise RunStopped(
                f"cannot write {self._path} ({error}); the checkpoints are safe: mend that, and run the same command "
                "again to go on"
            ) from error

    def _append(self, line: str) -> None:
        if "://" in str(self._path):  # objects in buckets cannot grow
            self._text += line
            self._path.write_text(self._text)
            return
        with self._path.open("a") as file:
            file.write(line)

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


class _Events:
    """TensorBoard's file of events. In a bucket, where files cannot grow, it is a copy of a local one."""

    def __init__(self, root: epath.Path, start_step: int):
        self._bucket = root if "://" in str(root) else None
        self._local = tempfile.TemporaryDirectory() if self._bucket else nullcontext(str(root))
        self._folder = self._local.__enter__()
        self._writer = SummaryWriter(self._folder, purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)
        self._copy()

    def close(self) -> None:
        self._writer.close()
        self._copy()
        self._local.__exit__(None, None, None)

    def _copy(self) -> None:
        if self._bucket:
            self._writer.flush()
            for file in Path(self._folder).iterdir():
                (self._bucket / file.name).write_bytes(file.read_bytes())


def _to_line(values: Mapping[str, int | float]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"
