"""Where a run's numbers go: WORKDIR/metrics.jsonl and TensorBoard events beside it."""

import json
import math
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from clip_jax.workdir import METRICS, absolute, read_metrics, write_whole


class MetricsWriter:
    """One JSON object per line, flushed at once. Only the process that writes logs makes one.

    A resumed run repeats the steps after its checkpoint: what an earlier life wrote about them is dropped first,
    so that every step has one line.
    """

    def __init__(self, workdir: str, start_step: int):
        root = absolute(workdir)
        root.mkdir(parents=True, exist_ok=True)
        path = root / METRICS
        kept = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        self._events = SummaryWriter(str(root), purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, and the same values as TensorBoard scalars; what is not finite is left out of both."""
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
        for key, value in metrics.items():
            self._events.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def close(self) -> None:
        """Flush the events."""
        self._events.close()
