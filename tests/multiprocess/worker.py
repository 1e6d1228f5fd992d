"""One process of a run: `python worker.py COORDINATOR PROCESSES INDEX WORKDIR`; alone if PROCESSES is 1."""

import logging
import sys

import jax

from clip_jax.distributed import initialize
from clip_jax.parallel import MeshConfig
from clip_jax.training.run import run
from tests.training.test_run import config_of

DEVICES = 8


def main(coordinator: str, processes: int, index: int, workdir: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        initialize(coordinator, processes, index)
        assert (logging.getLogger("clip_jax").level == logging.WARNING) == (index > 0)  # one process says what happens
    run(config_of(mesh=MeshConfig(data=4, fsdp=2)), workdir, zero_shot)


def zero_shot(config, training):
    from clip_jax.judged_run import Evaluation

    return Evaluation(config, training)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
