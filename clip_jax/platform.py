"""Which machine this is, as far as JAX has to be told, and what it gives this process."""

import hashlib
import importlib.util
import os
import platform
from contextlib import suppress
from pathlib import Path

# Told all this, libtpu neither asks a Cloud machine's metadata server who it is, nor complains when nobody answers.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}


CACHE_VARIABLE = "CLIP_JAX_CACHE"


def cache_folder(download_root: str | Path | None = None) -> Path:
    """`download_root`, or the environment variable CLIP_JAX_CACHE, or ~/.cache/clip_jax."""
    return Path(download_root or os.environ.get(CACHE_VARIABLE) or "~/.cache/clip_jax").expanduser()


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles in the cache folder, so that a second start need not compile again.

    A folder that was chosen already (JAX_COMPILATION_CACHE_DIR, `jax_compilation_cache_dir`) stays, and one that cannot
    be written to is not used. Programs for CPUs have the CPU's own instructions: each kind has its own folder.
    """
    import jax

    folder = cache_folder() / "compiled" / _cpu_kind()
    if jax.config.jax_compilation_cache_dir is not None:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))


def _cpu_kind() -> str:
    """A name that CPUs share only if they know the same instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def on_tpu_host() -> bool:
    """libtpu is installed and the chips' device files are there."""
    devices = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return importlib.util.find_spec("libtpu") is not None and devices


def usable_cores() -> int:
    """The cores that this process may use, which a container or scheduler can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_libtpu_quiet() -> None:
    """Where libtpu is installed for planning only, JAX tries it first; let that be short and silent.

    Call it before JAX touches a device. Other accelerators are found as ever, and what the user has set stays.
    """
    if not on_tpu_host():
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
