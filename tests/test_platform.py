"""libtpu, installed for planning on a machine without a TPU, must not be heard of."""

import importlib.util
import os
import subprocess
import sys

import pytest

from clip_jax import platform

COMMAND = "import jax; from clip_jax import cli; cli.run(lambda argv: print(jax.devices()))"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or platform.on_tpu_host(),
    reason="needs libtpu (requirements-tpu.txt) and no TPU",
)
def test_scripts_are_quiet_without_a_tpu():
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "TPU", "XLA"))}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout and not done.stderr


def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setattr(platform, "on_tpu_host", lambda: False)
    monkeypatch.setattr(os, "environ", {"TPU_MIN_LOG_LEVEL": "0"})
    platform.keep_libtpu_quiet()
    assert os.environ == {**platform.WITHOUT_TPU, "TPU_MIN_LOG_LEVEL": "0"}


def test_a_tpu_host_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "on_tpu_host", lambda: True)
    monkeypatch.setattr(os, "environ", {})
    platform.keep_libtpu_quiet()
    assert os.environ == {}
