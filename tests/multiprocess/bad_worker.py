"""One of two processes, the second of which reads a black image: `python bad_worker.py COORDINATOR INDEX WORKDIR`.

Prints the counts of steps and of skipped ones, and a digest of what lies on its first device, where both hold the same.
"""

import hashlib
import sys

import jax
import numpy as np
import pytest

from clip_jax.distributed import initialize
from clip_jax.parallel import MeshConfig
from clip_jax.training.guard import GuardConfig
from clip_jax.training.run import run
from tests.training.dark import black_images_are_nan, dark_data
from tests.training.test_bad_numbers import SIZE, position
from tests.training.test_run import CONFIG, config_of


def main(coordinator: str, index: int, workdir: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    initialize(coordinator, 2, index)
    black_images_are_nan(pytest.MonkeyPatch())
    theirs = CONFIG.batch_size - 1  # the last row of a batch is the second process's
    config = config_of(
        data=dark_data(0, SIZE, [position(2, theirs)]),
        mesh=MeshConfig(data=2, fsdp=2),
        total_steps=3,
        guard=GuardConfig(spike_sigma=5.0, spike_window=2),
    )
    state = run(config, workdir)
    held = b"".join(np.asarray(leaf.addressable_data(0)).tobytes() for leaf in jax.tree.leaves(state))
    print(int(state.step), int(state.guard.skipped), hashlib.sha256(held).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
