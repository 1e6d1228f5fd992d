"""Starting processes that find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# tensorboardX imports torch where it finds it, which takes longer than all that a worker needs.
WITHOUT_TORCH = """
import runpy, sys

class NoTorch:
    def find_spec(name, *_):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def start(module, *arguments, **environment):
    """`python -m tests.MODULE ARGUMENTS`, beginning."""
    command = [sys.executable, "-c", WITHOUT_TORCH, f"tests.{module}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(*processes):
    """What they print, when they have ended well."""
    printed = []
    for process in processes:
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
        printed.append((output, errors))
    return printed


def free_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"
