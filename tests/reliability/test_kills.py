"""A run that is killed at any moment and started again ends with the same bits as one that was never disturbed.

The long form, which also kills at random times and one of two processes: `make test-reliability`.
"""

import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.multiprocess.processes import free_address
from tests.reliability.harness import assert_same, begin, live, outcome
from tests.reliability.worker import MOMENTS

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a run that nothing happens to, and the seconds that it takes."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    code, said = live(workdir)
    assert code == 0, said
    return outcome(workdir), time.monotonic() - began


def test_killed_while_it_saves_and_stopped_by_signals(undisturbed, tmp_path):
    for moment, count in [("arrays begun", 1), ("half the list of files", 2), ("committed", 1)]:
        code, said = live(tmp_path, kill=moment, count=count)
        assert code == KILLED, said
    code, said = live(tmp_path, kill="batch", count=2, signal="SIGTERM")
    assert code == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM; step" in said and "Traceback" not in said
    code, said = live(tmp_path)
    assert code == 0, said
    assert_same(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(undisturbed, tmp_path, moment):
    """Twice at the same moment of a life, the second time where there is something to restore."""
    later = 4 if moment == "batch" else 1
    lives = []
    for count in (later, later):
        code, said = live(tmp_path, kill=moment, count=count, config={"keep_checkpoints": 1})
        lives.append(code)
        assert code in (KILLED, 0), said
    if lives[-1] != 0:
        code, said = live(tmp_path, config={"keep_checkpoints": 1})
        assert code == 0, said
    assert_same(tmp_path, undisturbed[0])


def disturbed(workdir, seconds, times, **order):
    """Lives that end at random times, until the run is done; returns how many did."""
    ended = 0
    for _ in range(times):
        code, said = live(workdir, kill=f"after {random.uniform(0, seconds)}", **order)
        if code == 0:
            break
        ended += 1
    else:
        code, said = live(workdir)
    assert code == 0, said
    return ended


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("SIGKILL", 30), ("SIGTERM", 10)])
def test_ended_at_random_times(undisturbed, tmp_path, name, times):
    random.seed(0)
    ended = 0
    for number in range(times):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        ended += disturbed(workdir, undisturbed[1], times - ended, signal=name)
        assert_same(workdir, undisturbed[0])
        if ended >= times:
            break
    assert ended >= times


def together(workdir, **order):
    """A life of two processes, of which the second one is told to end; returns both exit codes and what they said."""
    where = {"processes": 2, "devices": 4, "coordinator": free_address()}
    processes = [begin(workdir, index=index, **where, **(order if index == 1 else {})) for index in range(2)]
    said = [process.communicate(timeout=500)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    codes, said = together(whole)
    assert codes == [0, 0], said
    for moment, count in [("batch", 5), ("save under way", 1)]:
        codes, said = together(killed, kill=moment, count=count)
        assert codes[1] == KILLED and codes[0] != 0, said
    codes, said = together(killed, kill="batch", count=2, signal="SIGTERM")
    assert codes == [128 + signal.SIGTERM] * 2, said
    codes, said = together(killed)
    assert codes == [0, 0], said
    assert_same(killed, outcome(whole))


@pytest.mark.slow
def test_moved_to_other_numbers_of_devices_and_processes(undisturbed, tmp_path):
    """Each life takes two steps and is stopped by SIGTERM."""
    stopped = {"kill": "batch", "count": 2, "signal": "SIGTERM"}
    for devices in (8, 4, 2, 8):
        code, said = live(tmp_path, devices=devices, **stopped)
        assert code == 128 + signal.SIGTERM, said
    codes, said = together(tmp_path, **stopped)
    assert codes == [128 + signal.SIGTERM] * 2, said
    code, said = live(tmp_path)
    assert code == 0, said
    _, lines, samples = outcome(tmp_path)
    _, expected, expected_samples = undisturbed[0]
    assert samples == expected_samples
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing(undisturbed, tmp_path):
    """The logs of the batches, which are the test's own, are not on that disk."""
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    logs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        code, said = live(disk, logs=str(logs))
        assert code == 1, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in said, said
        assert "No space left on device" in errors[0] and "is untouched" in errors[0]
        subprocess.run(["mount", "-o", "remount,size=500m", disk], check=True)
        code, said = live(disk, logs=str(logs))
        assert code == 0, said
        for log in logs.iterdir():
            shutil.copy(log, disk)
        assert_same(disk, undisturbed[0])
    finally:
        subprocess.run(["umount", disk], check=True)
