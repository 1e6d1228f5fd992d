"""Where the data of one of two processes are bad, both skip the step."""

import os
import subprocess
import sys

from tests.multiprocess.test_two_processes import ROOT, free_port


def test_both_processes_skip_what_is_bad_on_one(tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "tests.multiprocess.bad_worker", coordinator]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path / "run")], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended[0][1][-3000:] + ended[1][1][-3000:]
    first, second = (output.splitlines()[-1].split() for output, _ in ended)  # after what gloo says
    assert first[:2] == ["3", "1"]
    assert first == second
    for _, errors in ended:
        assert "step 2 is skipped, 1 in a row: loss nan" in errors
