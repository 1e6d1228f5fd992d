"""The planner without the TPU compiler: what it says and tries, on 8 virtual CPU devices in a slice's place."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from clip_jax.cli import load_config
from clip_jax.errors import UserError
from clip_jax.models import parameter_count
from clip_jax.parallel import MeshConfig
from clip_jax.planner import alternatives, compile, report
from clip_jax.planner.compile import bytes_needed, make_plan
from clip_jax.planner.cost import CostEstimate, Traffic
from clip_jax.planner.plan import Memory, Plan
from clip_jax.planner.topologies import GIB, parse_topology
from clip_jax.processing import Augment
from clip_jax.training.adapters import AdapterConfig
from clip_jax.training.config import RunConfig
from clip_jax.training.initial_weights import InitialWeights
from tests import tiny

SLICE = parse_topology("v5e-8")
ROOM = SLICE.device.hbm_limit
COST = CostEstimate(compute_seconds=2.0, collective_seconds=0.5, collectives={"all-reduce": Traffic(3, 2 * GIB)})
# What INTERFACE.md promises of --plan_output.
KEYS = {
    *("topology", "chips", "global_batch", "model", "parameters", "fits", "flops_per_example", "compile_seconds"),
    *("hbm_bytes_limit", "hbm_bytes_peak", "hbm_bytes_arguments", "hbm_bytes_temporaries", "collectives"),
    *("estimated_step_seconds", "estimated_mfu", "estimated_examples_per_second"),
}


def config_of(**overrides) -> RunConfig:
    return load_config("demo", {field: str(value) for field, value in overrides.items()})


CONFIG = config_of(**{"total_steps": 1000})
FITS = Plan(CONFIG, SLICE, Memory(10 * GIB, 4 * GIB, 4 * GIB, 3 * GIB, 13 * GIB), COST, 1.0)
TOO_LARGE = Plan(CONFIG, SLICE, Memory(GIB, 40 * GIB, 0, 0, 41 * GIB), None, 1.0)


@pytest.fixture
def virtual_slice(monkeypatch):
    """CPU devices, and their compiler, where a TPU slice was asked for."""
    devices = type("Topology", (), {"devices": jax.devices()[:8]})
    monkeypatch.setattr(compile.topologies, "get_topology_desc", lambda **_: devices)


def test_memory_of_the_very_step(virtual_slice):
    whole = dataclasses.replace(config_of(batch_size=64, remat="full", unroll=1), model=tiny.VIT)
    made = make_plan(whole, SLICE)
    smaller = make_plan(dataclasses.replace(whole, mesh=MeshConfig(data=1, fsdp=8)), SLICE)
    state = 3 * 4 * parameter_count(tiny.VIT)  # parameters and two moments
    batch = 64 // 8 * (32 * 32 * 3 + 16 * 4)
    assert made.memory.arguments == pytest.approx(state + batch, rel=1e-3)
    assert made.memory.aliased == pytest.approx(state, rel=1e-3)  # the old state's memory is used again
    assert state < made.memory.peak < 2 * state + made.memory.temporaries
    assert smaller.memory.arguments < made.memory.arguments / 6
    assert made.cost.collectives["collective-permute"].count > 0
    assert "all-gather" in smaller.cost.collectives


def test_adapters_and_cached_features_need_no_moments_of_weights_and_no_images(virtual_slice):
    config = dataclasses.replace(
        config_of(batch_size=64, unroll=1),
        model=tiny.VIT,
        init=InitialWeights("MODEL"),
        adapters=AdapterConfig(rank=2, kernels=("text/*/query/kernel",)),
        cache_features=True,
        augment=Augment(crop="center"),
    )
    made = make_plan(config, SLICE)
    kernels, factors = 2 * 64 * 64, 2 * 2 * (64 + 64)
    state = 4 * (parameter_count(tiny.VIT) + kernels + 3 * factors)
    assert made.cost is not None and made.memory.arguments <= 1.001 * (state + 64 // 8 * (32 * 4 + 16 * 4))


def test_too_large_a_step_is_described_without_a_program(virtual_slice, monkeypatch):
    class TooLarge:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ... Used 27.50G of 15.75G hbm. Exceeded by 11.75G.")

    monkeypatch.setattr(compile, "make_train_step", lambda *_: TooLarge())
    made = make_plan(CONFIG, SLICE)
    state = 3 * 4 * parameter_count(CONFIG.model)
    assert made.memory.peak == int(27.5 * GIB)
    assert made.memory.arguments == pytest.approx(state, rel=0.01)
    assert not made.fits
    assert made.to_dict()["estimated_mfu"] is None


def test_batches_that_do_not_divide_are_the_users_mistake(virtual_slice):
    with pytest.raises(UserError, match="batch_size must be a multiple of 8"):
        make_plan(config_of(batch_size=60), SLICE)


def test_bytes_in_the_compilers_messages():
    total = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (24.06G) exceeds available HBM (15.75G)"
    assert bytes_needed("RESOURCE_EXHAUSTED: Used 512.00M of 15.75G hbm") == 2**29
    assert bytes_needed(total) == int(24.06 * GIB)
    with pytest.raises(RuntimeError, match="INTERNAL: no"):
        bytes_needed("INTERNAL: no")


def test_output_has_the_promised_keys_and_consistent_numbers():
    values = json.loads(json.dumps(FITS.to_dict(), allow_nan=False))
    assert set(values) >= KEYS
    assert values["hbm_bytes_peak"] == 13 * GIB
    assert values["estimated_step_seconds"] == 2.5
    assert values["estimated_examples_per_second"] == CONFIG.batch_size / 2.5
    achieved = values["flops_per_example"] * CONFIG.batch_size / 2.5
    assert values["estimated_mfu"] == pytest.approx(achieved / (8 * 197e12))
    assert values["collectives"] == {"all-reduce": {"count": 3, "bytes": 2 * GIB}}
    assert values["settings"]["mesh.data"] == 8
    assert set(values) == set(TOO_LARGE.to_dict())


def changed(arguments: float, temporaries: float, **overrides) -> tuple | None:
    memory = Memory(int(arguments * GIB), int(temporaries * GIB), 0, 0, int((arguments + temporaries) * GIB))
    config = alternatives.next_change(Plan(config_of(**overrides), SLICE, memory, None, 1.0))
    return config and (config.execution.remat, config.mesh.fsdp, config.microbatches)


def test_changes_go_from_the_cheapest_and_leave_out_what_cannot_suffice():
    assert changed(2, 20, remat="dots") == ("full", 1, 1)
    assert changed(8, 20, remat="full") == ("full", 8, 1)
    assert changed(2, 20, remat="full") == (
        "full",
        1,
        2,
    )  # 18 GiB of activations in 15.75 whatever becomes of the state
    assert changed(2, 40, remat="full") == ("full", 1, 4)
    assert changed(8, 20, remat="full", microbatches=4, **{"mesh.data": 1, "mesh.fsdp": 8}) == ("full", 8, 8)
    assert changed(2, 20, remat="full", microbatches=16) is None  # 128 examples on 8 devices: one at a time


def test_the_printed_plan_tells_facts_from_estimates():
    text = report.describe(FITS)
    for words in ("the compiler's fact", "an estimate", "13.00 GiB of 15.75: fits, 2.75 GiB to spare", "all-reduce"):
        assert words in text
    assert "does not fit: 25.25 GiB too much" in report.describe(TOO_LARGE)


def test_the_printed_peak_is_explained():
    """Its parts add up to more."""
    assert "not all alive at the same time" in report.describe(FITS)
    assert "not all alive" not in report.describe(TOO_LARGE)  # there the peak is their sum


def test_what_the_program_does_not_say_is_printed_and_written():
    cost = dataclasses.replace(COST, unknown_loops=frozenset(["while.1", "while.2"]), unknown_groups=frozenset(["ar"]))
    made = dataclasses.replace(FITS, cost=cost)
    text = report.describe(made)
    assert "2 loops have no known trip count" in text and "1 collectives do not say who takes part" in text
    assert (made.to_dict()["unknown_loops"], made.to_dict()["unknown_groups"]) == (2, 1)
    assert "trip count:" not in report.describe(FITS) and "takes part" not in report.describe(FITS)


@pytest.fixture
def compiler(monkeypatch):
    """Stands for the compiler: only full rematerialisation with fsdp fits."""
    tried = []

    def compile_plan(config, topology):
        tried.append(config)
        good = config.execution.remat == "full" and config.mesh.fsdp > 1
        memory = Memory(GIB, GIB, GIB, GIB, 2 * GIB) if good else Memory(GIB, ROOM, 0, 0, ROOM + GIB)
        return Plan(config, topology, memory, COST if good else None, 1.0)

    for module in (report, alternatives):
        monkeypatch.setattr(module, "make_plan", compile_plan)
    monkeypatch.setattr(report, "use_compiler_only", lambda: None)
    return tried


def test_names_the_first_change_that_fits(compiler, capsys, tmp_path):
    report.main_plan(CONFIG, "v5e-8", str(tmp_path / "plan.json"))
    assert len(compiler) == 3
    changes = "--config.remat=full --config.mesh.data=1 --config.mesh.fsdp=8"
    assert f"It fits with {changes}:" in capsys.readouterr().out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert not written["fits"] and written["alternative"]["fits"]


def test_says_so_when_nothing_fits(compiler, capsys):
    config = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, data=1, tensor=8), batch_size=3)
    report.main_plan(config, "v5e-8")
    assert "take more chips or a smaller batch" in capsys.readouterr().out


def test_a_missing_compiler_names_the_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-tpu\.txt"):
        report.main_plan(CONFIG, "v5e-8")
