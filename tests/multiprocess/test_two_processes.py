"""Two processes of four devices learn what one process of eight learns."""

import os
import shutil
import socket
from contextlib import closing

import numpy as np
import pytest

from clip_jax.training.lock import Lock
from clip_jax.workdir import read_metrics
from tests.multiprocess.processes import finish, free_address, start


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    finish(start("worker", "none", 1, 0, alone))
    coordinator = free_address()
    finish(*(start("worker", coordinator, 2, index, together) for index in range(2)))
    return alone, together


def test_two_processes_learn_the_same_as_one(workdirs):
    alone, together = (read_metrics(workdir) for workdir in workdirs)
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    for ours, theirs in zip(together, alone, strict=True):
        for key in ("loss", "logit_scale", "grad_norm", "eval/digits/acc1"):
            assert (key in ours) == (key in theirs)
            if key in ours:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5)


def test_only_one_process_writes_logs(workdirs):
    assert len(list(workdirs[1].glob("events.out.tfevents*"))) == 1
    assert len(read_metrics(workdirs[1])) == len(read_metrics(workdirs[0]))


def test_a_run_of_two_processes_is_continued_by_one(workdirs):
    """The checkpoint that two processes wrote is restored on other hosts: one process, nothing left to train."""
    finish(start("worker", "none", 1, 0, workdirs[1]))


def test_no_process_waits_where_the_first_refuses(workdirs, tmp_path):
    """Another run's lock is found by the first process alone."""
    shutil.copytree(workdirs[1], tmp_path / "run")
    coordinator = free_address()
    with closing(Lock(tmp_path / "run")):
        processes = [start("worker", coordinator, 2, index, tmp_path / "run") for index in range(2)]
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert f"process {os.getpid()} on {socket.gethostname()} is training" in errors[0]
    assert "process 0 refused to go on" in errors[1]
