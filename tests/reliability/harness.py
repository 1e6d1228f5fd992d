"""Runs that are killed and started again, and what is left of them at the end."""

import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clip_jax.training.clock import PHASES
from clip_jax.training.step_folder import read_arrays, rest_names
from clip_jax.workdir import read_metrics
from tests.multiprocess.processes import start
from tests.reliability.worker import STEPS

SHARES = ("goodput", *(f"time/{phase}" for phase in PHASES))
TIMES = ("examples_per_second", "data_wait_fraction", "seconds", *SHARES)


def begin(workdir, **order):
    """A process of a run."""
    return start("reliability.worker", workdir, json.dumps(order))


def live(workdir, **order):
    """One life of a run, to its end; returns its exit code and what it said."""
    process = begin(workdir, **order)
    said = process.communicate(timeout=500)[1]
    return process.returncode, said


def outcome(workdir):
    """What a finished run has left: every array, every line of metrics without times, every sample that it saw."""
    folder = epath.Path(workdir) / "checkpoints" / str(STEPS)
    items = ["variables", *(name for name in rest_names() if (folder / name).is_dir())]
    arrays = jax.tree_util.tree_leaves_with_path({name: read_arrays(folder / name) for name in items})
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(workdir)]
    samples = {}
    for file in Path(workdir).glob("batches-*.log"):
        for line in file.read_text().splitlines():
            step, row, checksum = line.split()
            samples.setdefault((int(step), int(row)), set()).add(checksum)
    return {jax.tree_util.keystr(path): array for path, array in arrays}, lines, samples


def assert_same(workdir, undisturbed):
    arrays, lines, samples = outcome(workdir)
    expected_arrays, expected_lines, expected_samples = undisturbed
    assert arrays.keys() == expected_arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array.view(np.uint32), expected_arrays[path].view(np.uint32), err_msg=path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines == expected_lines
    assert samples == expected_samples  # a step that was taken twice saw the same batch
