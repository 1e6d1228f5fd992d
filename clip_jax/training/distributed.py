"""Joining the processes of a multi-host run."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.errors import UserError
from clip_jax.platform import on_tpu_host

T = TypeVar("T")


def on_first_process(action: Callable[[], T]) -> T | None:
    """What `action` returns on process 0, None on the others. If it refuses, all end, and none waits for the others.

    Raises:
      UserError: the action's on process 0, one that points there on the others.
    """
    result, mistake = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            mistake = error
    refused = refused_by_any(mistake is not None)
    if mistake is not None:
        raise mistake
    if refused:
        raise UserError("process 0 refused to go on; its own message says why")
    return result


def refused_by_any(refuses: bool) -> bool:
    """Whether any process refuses to go on; all must call this at the same place."""
    return sum_over_hosts([refuses]) != [0]


def sum_over_hosts(counts: Sequence[int]) -> list[int]:
    """The sum of each count over all processes, which all must call this at the same place."""
    if jax.process_count() == 1:
        return [int(count) for count in counts]
    return multihost_utils.process_allgather(np.array(counts, np.int32)).sum(axis=0).tolist()


def initialize(coordinator: str | None, processes: int | None, process_index: int | None) -> None:
    """Make this process one of several, before anything else touches a device; only the first one logs events then.

    By hand when told where the coordinator is; by itself on TPU hosts and under Slurm, where JAX knows how to find
    the others; otherwise nothing happens and the process is alone.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: their number.
      process_index: which one this is.

    Raises:
      UserError: only some of the three are given, or they make no sense.
    """
    by_hand = (coordinator, processes, process_index)
    if any(value is not None for value in by_hand):
        if any(value is None for value in by_hand):
            raise UserError("--coordinator, --processes and --process_index go together; give all three or none")
        if not 0 <= process_index < processes:
            raise UserError(
                f"--process_index must be at least 0 and less than --processes {processes}, got {process_index}"
            )
        jax.distributed.initialize(coordinator, processes, process_index)
    elif on_tpu_host() or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()
    else:
        return
    if jax.process_index() != 0:
        logging.getLogger("clip_jax").setLevel(logging.WARNING)
