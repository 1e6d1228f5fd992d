"""libtpu, installed for planning on a machine without a TPU, must not be heard of; compiled programs are kept."""

import importlib.util
import os
import subprocess
import sys

import pytest

from clip_jax import platform

COMMAND = "import jax; from clip_jax import cli; cli.run(lambda argv: print(jax.devices()))"


COMPILE = """
import jax
from clip_jax.platform import keep_compiled_programs

keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 2)(3))
"""


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


def compile_something(cache, **variables):
    """A process of its own, as the test session has chosen a folder for itself."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))}
    environment = {**inherited, "JAX_PLATFORMS": "cpu", platform.CACHE_VARIABLE: str(cache), **variables}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "6\n" and not done.stderr


def compiled(folder):
    """The programs in a folder and when they were written, without the notes of when each was last used."""
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*-cache"))


def test_what_one_process_compiles_the_next_one_finds(tmp_path):
    compile_something(tmp_path)
    first = compiled(tmp_path / "compiled")
    compile_something(tmp_path)
    assert first and compiled(tmp_path / "compiled") == first


def test_a_cache_that_cannot_be_written_to_is_not_used(tmp_path):
    (tmp_path / "file").write_text("")
    compile_something(tmp_path / "file")


def test_a_cache_of_the_users_own_stays(tmp_path):
    compile_something(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert compiled(tmp_path / "theirs") and not (tmp_path / "ours").exists()
