"""One process of a run: `python worker.py COORDINATOR PROCESSES INDEX WORKDIR MODEL`; alone if PROCESSES is 1."""

import logging
import sys

import jax

from clip_jax.distributed import initialize
from clip_jax.parallel import MeshConfig
from clip_jax.training.initial_weights import InitialWeights
from tests.training.test_run import config_of

DEVICES = 8


def main(coordinator: str, processes: int, index: int, workdir: str, model: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        initialize(coordinator, processes, index)
        assert (logging.getLogger("clip_jax").level == logging.WARNING) == (index > 0)  # one process says what happens
    from clip_jax.judged_run import train

    train(config_of(mesh=MeshConfig(data=4, fsdp=2), init=InitialWeights(model), patience=9), workdir)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
