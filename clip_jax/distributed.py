"""The processes of a run on several hosts: how they join, what they tell each other, and how all end where one must."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.errors import DamagedFile, RunStopped, UserError
from clip_jax.platform import on_tpu_host

T = TypeVar("T")

_KINDS = {kind.__name__: kind for kind in (UserError, DamagedFile, RunStopped)}


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return jax.process_index() == 0


def together(action: Callable[[], T]) -> T:
    """What `action` returns, on every process; if it refuses on any, all end, and none waits for the others.

    All processes must call this at the same place.

    Raises:
      UserError, RunStopped: the action's own, or another process's, which says whose it is.
    """
    result, mistake = None, None
    try:
        result = action()
    except (UserError, RunStopped) as error:
        mistake = error
    agree(mistake)
    return result


def agree(mistake: UserError | RunStopped | None) -> None:
    """Raise on every process what is a mistake on any; all processes must call this at the same place.

    Args:
      mistake: this process's, if it has one.

    Raises:
      UserError, RunStopped: `mistake`, or one of another process's kind, which says whose it is.
    """
    said = of_every_process(None if mistake is None else [type(mistake).__name__, str(mistake)])
    if mistake is not None:
        raise mistake
    for process, (kind, message) in ((process, each) for process, each in enumerate(said) if each is not None):
        raise _KINDS.get(kind, UserError)(f"process {process} refused to go on: {message}")


def on_first_process(action: Callable[[], T]) -> T | None:
    """What `action` returns on process 0, None on the others. If it refuses, all end, and none waits for the others.

    Raises:
      UserError: as `together`.
    """
    return together(lambda: action() if is_first() else None)


def of_every_process(value: Any) -> list[Any]:
    """What each process has, in their order; all processes must call this at the same place.

    Args:
      value: anything that JSON holds.
    """
    return [json.loads(content) for content in bytes_of_every_process(json.dumps(value).encode())]


def bytes_of_every_process(content: bytes) -> list[bytes]:
    """What each process has, in their order; all processes must call this at the same place."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(2 ** int(sizes.max()).bit_length(), np.uint8)  # of few sizes, each of which is compiled
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def sum_over_hosts(counts: Sequence[int]) -> list[int]:
    """The sum of each count over all processes, which all must call this at the same place."""
    return [sum(each) for each in zip(*of_every_process(list(counts)), strict=True)]


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
    if not is_first():
        logging.getLogger("clip_jax").setLevel(logging.WARNING)
