"""One run a workdir: who is refused, who takes over, and what the dispossessed do."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace

import pytest

from clip_jax.errors import RunStopped, UserError
from clip_jax.training.lock import LOCK, Holder, Lock


def hold_in_another_process(workdir):
    code = f"from clip_jax.training.lock import Lock; lock = Lock({str(workdir)!r}); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def write(workdir, holder):
    (workdir / LOCK).write_text(json.dumps(asdict(holder)))


def test_a_second_run_is_refused_with_the_first_ones_host_and_pid_until_it_ends(tmp_path):
    first = hold_in_another_process(tmp_path)
    message = f"process {first.pid} on {re.escape(socket.gethostname())} is training in {tmp_path}"
    with pytest.raises(UserError, match=message):
        Lock(tmp_path)
    first.kill()
    first.communicate()
    with closing(Lock(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_pid_that_another_process_has_by_now_is_no_obstacle(tmp_path):
    write(tmp_path, replace(Holder.myself(), began="1"))
    Lock(tmp_path).close()


def test_a_lock_of_another_machine_is_dead_when_nobody_renews_it(tmp_path):
    elsewhere = replace(Holder.myself(), host="elsewhere", machine="another boot")
    write(tmp_path, elsewhere)
    Lock(tmp_path, patience=0.3).close()
    write(tmp_path, elsewhere)
    renewing = subprocess.Popen(
        [sys.executable, "-c", RENEW, str(tmp_path / LOCK), json.dumps(asdict(elsewhere))], stdout=subprocess.PIPE
    )
    renewing.stdout.readline()
    with pytest.raises(UserError, match=r"on elsewhere is training"):
        Lock(tmp_path, patience=10.0)
    renewing.kill()
    renewing.communicate()


RENEW = """
import json, os, sys, time
path, values = sys.argv[1], json.loads(sys.argv[2])
while True:
    values["renewals"] += 1
    with open(path + ".new", "w") as file:
        file.write(json.dumps(values))
    os.replace(path + ".new", path)
    print("renewed", flush=True)
    time.sleep(0.05)
"""


def test_whoever_lost_the_lock_stops_and_leaves_it_to_the_other(tmp_path):
    lock = Lock(tmp_path, renewal=0.01)
    lock.check()
    write(tmp_path, replace(Holder.myself(), host="elsewhere"))
    end = time.monotonic() + 10
    with pytest.raises(RunStopped, match="another process has taken over"):
        while time.monotonic() < end:
            lock.check()
            time.sleep(0.01)
    lock.close()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


def test_a_lock_is_renewed_and_an_unheard_success_is_no_loss(tmp_path):
    lock = Lock(tmp_path, renewal=0.01)
    end = time.monotonic() + 10
    while json.loads((tmp_path / LOCK).read_text())["renewals"] < 3 and time.monotonic() < end:
        time.sleep(0.01)
    with lock._renewing:
        write(tmp_path, replace(Holder.myself(), renewals=7))
    time.sleep(0.1)
    lock.check()
    lock.close()
    assert not (tmp_path / LOCK).exists()


def test_a_damaged_lock_is_no_obstacle(tmp_path):
    (tmp_path / LOCK).write_text("{")
    Lock(tmp_path).close()
