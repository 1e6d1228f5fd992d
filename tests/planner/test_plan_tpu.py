"""The planner with the TPU compiler itself, where it is installed."""

import importlib.util
import json

import jax
import pytest
from jax.experimental import topologies

from clip_jax.cli import load_config
from clip_jax.models import parameter_count
from clip_jax.planner.compile import make_plan, use_compiler_only
from clip_jax.planner.report import main_plan
from clip_jax.planner.topologies import parse_topology

# Slow: the TPU compiler takes a minute or more, and is an optional requirement.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -r requirements-tpu.txt"
    ),
]

SMALL = {"batch_size": "32", "dtype": "bfloat16", "remat": "full", "unroll": "1", "model.vision.layers": "3"}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """What the planner sets is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_ACCELERATOR_TYPE", "TPU_MIN_LOG_LEVEL"):
            patch.setenv(name, "")
        patch.setenv("TPU_WORKER_HOSTNAMES", "")
        cached = jax.config.jax_enable_compilation_cache
        use_compiler_only()
        yield
        jax.config.update("jax_enable_compilation_cache", cached)


def test_plan_of_a_small_step(tmp_path):
    config = load_config("demo", SMALL)
    main_plan(config, "v5e-4", str(tmp_path / "plan.json"))
    values = json.loads((tmp_path / "plan.json").read_text())
    parameters = 4 * parameter_count(config.model)
    state = 3 * parameters  # and two moments
    assert values["fits"]
    assert values["unknown_loops"] == values["unknown_groups"] == 0
    assert 1 < values["hbm_bytes_arguments"] / state < 1.1  # arrays are padded to whole tiles
    assert values["hbm_bytes_aliased"] > 0.99 * state
    assert 0 < values["estimated_mfu"] < 1
    assert values["estimated_seconds_by_kind"]["computation"] > 0
    # A trip round 4 chips, forward and backward, moves text features 3 or 4 times and what collects with them.
    assert 16 <= values["collectives"]["collective-permute"]["count"] <= 40
    assert parameters / 2 < values["collectives"]["all-reduce"]["bytes"] < state  # gradients, some of them bfloat16


def test_parameters_are_gathered_whole_on_a_small_slice():
    """Parts of 48 rows invite the compiler to loop over them, sending each on to the next chip."""
    sizes = {"model.vision.width": "768", "model.vision.mlp_width": "3072", "model.vision.heads": "12"}
    changes = {**SMALL, **sizes, "batch_size": "2048", "mesh.data": "1", "mesh.fsdp": "16"}
    config = load_config("demo", changes)
    collectives = make_plan(config, parse_topology("v5e-16")).cost.collectives
    assert collectives["collective-permute"].count < 200  # the loss's ring alone: 16 chips, forwards and backwards
    assert collectives["all-gather"].count > 3 * 2 * 6  # layers x forward and backward x matrices of a block


@pytest.mark.parametrize("name", ["v3-32", "v4-16", "v4-512", "v5e-8", "v5p-128", "v6e-256", "tpu7x-128", "2xv5e-16"])
def test_the_compiler_knows_every_generation(name):
    topology = parse_topology(name)
    devices = topologies.get_topology_desc(**topology.description()).devices
    assert len(devices) == topology.chips * topology.generation.devices_per_chip
    assert len({getattr(device, "slice_index", 0) for device in devices}) == topology.slices
