"""What becomes of skipped steps: each is said, and too many in a row end the run with a report of their first batch."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import jax
import numpy as np
from etils import epath

from clip_jax.data.reader import TrainReader
from clip_jax.errors import RunStopped, UserError
from clip_jax.platform import usable_cores
from clip_jax.training.checkpoints import Checkpoints
from clip_jax.training.loop import Hook, Step
from clip_jax.workdir import absolute, write_whole

logger = logging.getLogger(__name__)


class BadNumbers(Hook):
    """Watches the counts of skipped steps, one step behind the devices; all hosts see the same ones.

    Args:
      max_skipped: steps in a row at which the run stops.
      checkpoints: if there is none by then, the state as it is becomes the first.
      report: lists the samples of a step, and says where.

    Raises:
      RunStopped: so many steps in a row were skipped.
    """

    def __init__(self, max_skipped: int, checkpoints: Checkpoints, report: Callable[[int], str]):
        self._max_skipped, self._checkpoints, self._report = max_skipped, checkpoints, report
        self._pending: Step | None = None

    def step(self, step: Step) -> None:
        for taken in (self._pending, step if step.last else None):
            if taken is not None and self._too_many(taken):
                if self._checkpoints.latest_step() is None:
                    self._checkpoints.save(step.number, step.state)
                self._stop(taken)
        self._pending = step

    def _too_many(self, step: Step) -> bool:
        in_a_row = int(step.metrics["skipped_in_a_row"])
        if in_a_row:
            logger.warning("step %d is skipped, %d in a row: %s", step.number, in_a_row, _why(step))
        return in_a_row >= self._max_skipped

    def _stop(self, step: Step) -> NoReturn:
        first = step.number - int(step.metrics["skipped_in_a_row"]) + 1
        where = self._report(first) if jax.process_index() == 0 else "process 0 says which samples they began with"
        raise RunStopped(
            f"steps {first} to {step.number} were skipped for bad numbers, the last one for its {_why(step)}; what is "
            f"saved is finite; {where}; mend the data, or lower the learning rate in another run"
        )


def _why(step: Step) -> str:
    loss, grad_norm = (float(step.metrics[name]) for name in ("loss", "grad_norm"))
    words = f"loss {loss:g}, gradient norm {grad_norm:g}"
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    return f"{words}, a spike or one that leads to what is not finite" if finite else words


def report_batch(workdir: epath.PathLike, reader: TrainReader, step: int) -> str:
    """Write which samples a step read to WORKDIR/skipped_step_STEP.jsonl: an object for each, in their order.

    Returns:
      where they are, or why they could not be listed; the run that ends has better to say than another error.
    """
    path = absolute(workdir) / f"skipped_step_{step}.jsonl"
    size = reader.mixture.batch_size
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:
            lines = pool.map(lambda position: _line(reader, position), range((step - 1) * size, step * size))
            write_whole(path, "".join(lines))
    except (UserError, OSError) as error:
        return f"the samples of step {step} cannot be listed ({error})"
    return f"{path} lists the samples of step {step}"


def _line(reader: TrainReader, position: int) -> str:
    (sample,) = reader.samples(np.array([position]), Counter())
    fields = {name: getattr(sample, name) for name in ("source", "index", "key", "caption")}
    return json.dumps({"position": position, **fields}) + "\n"
