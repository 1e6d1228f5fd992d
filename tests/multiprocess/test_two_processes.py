"""Two processes of four devices learn what one process of eight learns."""

import os
import shutil
import socket
from contextlib import closing

import jax
import numpy as np
import pytest

from clip_jax import model_folder
from clip_jax.training.lock import Lock
from clip_jax.weights import load_variables
from clip_jax.workdir import read_metrics
from tests import tiny
from tests.multiprocess.processes import finish, free_address, start
from tests.training.test_run import CONFIG


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    model = alone.parent / "model"
    model_folder.write(model, CONFIG.model, tiny.telling_variables(CONFIG.model))
    finish(start("multiprocess.worker", "none", 1, 0, alone, model))
    coordinator = free_address()
    finish(*(start("multiprocess.worker", coordinator, 2, index, together, model) for index in range(2)))
    return alone, together


def test_two_processes_learn_the_same_as_one(workdirs):
    alone, together = (read_metrics(workdir) for workdir in workdirs)
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    for ours, theirs in zip(together, alone, strict=True):
        for key in ("loss", "logit_scale", "grad_norm", "eval/digits/acc1"):
            assert (key in ours) == (key in theirs)
            if key in ours:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5)


def test_two_processes_keep_what_they_started_from(workdirs):
    start = load_variables(workdirs[1] / "start")
    jax.tree.map(np.testing.assert_array_equal, start, load_variables(workdirs[1].parent / "model"))


def test_only_one_process_writes_logs(workdirs):
    assert len(list(workdirs[1].glob("events.out.tfevents*"))) == 1
    assert len(read_metrics(workdirs[1])) == len(read_metrics(workdirs[0]))


def test_a_run_of_two_processes_is_continued_by_one(workdirs):
    """The checkpoint that two processes wrote is restored on other hosts: one process, nothing left to train."""
    finish(start("multiprocess.worker", "none", 1, 0, workdirs[1], workdirs[1].parent / "model"))


def test_no_process_waits_where_the_first_refuses(workdirs, tmp_path):
    """Another run's lock is found by the first process alone."""
    shutil.copytree(workdirs[1], tmp_path / "run")
    arguments = tmp_path / "run", workdirs[1].parent / "model"
    coordinator = free_address()
    with closing(Lock(tmp_path / "run")):
        processes = [start("multiprocess.worker", coordinator, 2, index, *arguments) for index in range(2)]
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert f"process {os.getpid()} on {socket.gethostname()} is training" in errors[0]
    assert "process 0 refused to go on" in errors[1]
