"""Every test sees 8 virtual CPU devices, exact float32 products, and no silent rank promotion."""

import logging
import os
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from hypothesis import settings

os.environ["XLA_FLAGS"] = " ".join(
    [
        # Eight devices share few cores: one that waits for the others is slow, not stuck, and must not end the process.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        # Most time goes into compiling small programs that run once: all passes over HLO, but none of LLVM's.
        "--xla_backend_optimization_level=0",
        # XLA's older code generator takes half as long; later versions do not have it, and refuse the flag.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    ]
)

# Compiled programs are kept between tests and runs; the subprocesses that tests start find them too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Folders whose files take a minute or two each.
LONG = ("multiprocess", "parity", "reliability")


# The same examples in every run, on slow machines too.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def own_cache(request, tmp_path_factory):
    """What an evaluation keeps does not outlive the tests; the weights that network tests download do."""
    if any(item.get_closest_marker("network") for item in request.session.items):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_device():
    """For runs of which no test asks how many devices they are spread over: one takes half of what eight take."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture
def quiet_again():
    """After a script's own logging, the tests' again."""
    absl, logger = logging.getLogger("absl"), logging.getLogger("clip_jax")
    filters = [*absl.filters]
    yield
    absl.filters[:] = filters
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One rendering of a small `shapes` data set for all tests."""
    from clip_jax.data import shapes  # imports TFDS

    directory = str(tmp_path_factory.mktemp("tfds"))
    with pytest.MonkeyPatch.context() as patch:
        few = {split: (labels, 4) for split, (labels, _) in shapes.SPLITS.items()}
        patch.setattr(shapes, "SPLITS", few)
        shapes.prepared_builder(directory)
    return directory


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory):
    """The prepared data set `tiny_photos`."""
    from tests.tiny_photos import TinyPhotos  # imports TFDS

    directory = str(tmp_path_factory.mktemp("photos"))
    TinyPhotos(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory
