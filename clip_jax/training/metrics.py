"""Where a run's numbers go: WORKDIR/metrics.jsonl and TensorBoard events beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from clip_jax.model_folder import METRICS


class MetricsWriter:
    """One JSON object a line, flushed at once. Only the process that writes logs makes one.

    A resumed run repeats the steps after its checkpoint: what an earlier life wrote about them is dropped first,
    so that every step has one line.
    """

    def __init__(self, workdir: str, start_step: int):
        root = epath.Path(workdir).expanduser()
        root.mkdir(parents=True, exist_ok=True)
        path = root / METRICS
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._path = path
        self._events = SummaryWriter(str(root), purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and the same values as TensorBoard scalars."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for key, value in metrics.items():
            self._events.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order."""
    return [json.loads(line) for line in _lines(epath.Path(workdir).expanduser() / METRICS)]


def _lines(path: epath.Path) -> list[str]:
    """Complete lines; a half-written last one (the process was killed) is dropped."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line]
