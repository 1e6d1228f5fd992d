"""`train.py --plan`: says what a run will need on a TPU slice before anyone pays for it, and what to change if it
does not fit.
"""

import json
from pathlib import Path

from clip_jax.planner.alternatives import first_that_fits
from clip_jax.planner.compile import make_plan, use_compiler_only
from clip_jax.planner.cost import CostEstimate
from clip_jax.planner.plan import Plan
from clip_jax.planner.topologies import GIB, parse_topology
from clip_jax.training.config import RunConfig

PEAK = """\
  (less than the rows above it add up to: temporaries are not all alive at the same time, and some take the
  place of the old state)"""


def main_plan(config: RunConfig, topology_name: str, output: str | None = None) -> None:
    """Print the plan of a run; if it does not fit, also the first change found that makes it fit.

    Args:
      config: the run.
      topology_name: a Cloud name, such as `v5e-256` or `2xv5e-256`.
      output: a JSON file to write `Plan.to_dict` to, with the change as `alternative`.

    Raises:
      UserError: unknown topology, no libtpu, or a batch that does not divide over the devices.
    """
    topology = parse_topology(topology_name)
    use_compiler_only()
    plan = make_plan(config, topology)
    print(describe(plan))
    result = plan.to_dict()
    if not plan.fits:
        alternative = first_that_fits(plan)
        print(describe_alternative(plan, alternative))
        result["alternative"] = alternative.to_dict() if alternative else None
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")


def describe(plan: Plan) -> str:
    """The plan in words, for a terminal."""
    config, topology, memory = plan.config, plan.topology, plan.memory
    device, unit = topology.device, topology.generation.device_name
    settings = ", ".join(f"{name}={value}" for name, value in plan.settings.items())
    room = device.hbm_limit - memory.peak
    verdict = f"fits, {room / GIB:.2f} GiB to spare" if plan.fits else f"does not fit: {-room / GIB:.2f} GiB too much"
    lines = [
        f"{config.name} on {topology.name}: {topology.chips} chips, batch {config.batch_size:,} "
        f"({config.batch_size / plan.devices:,.0f} per {unit})",
        f"  {settings}",
        "",
        f"Memory per {unit} (the compiler's fact)",
        f"  arguments: state and batch   {memory.arguments / GIB:8.2f} GiB",
        f"  temporaries                  {memory.temporaries / GIB:8.2f} GiB",
        f"  outputs in new memory        {(memory.outputs - memory.aliased) / GIB:8.2f} GiB",
        f"  peak, alive at once          {memory.peak / GIB:8.2f} GiB of {device.hbm_limit / GIB:.2f}: {verdict}",
    ]
    return "\n".join([*lines, PEAK, "", *_describe_cost(plan, plan.cost)] if plan.cost else lines)


def _describe_cost(plan: Plan, cost: CostEstimate) -> list[str]:
    device, unit = plan.topology.device, plan.topology.generation.device_name
    collectives = [
        f"  {kind:28} {traffic.count:6,} times {traffic.bytes / GIB:8.3f} GiB"
        for kind, traffic in sorted(cost.collectives.items())
    ]
    return [
        f"Collectives per step, results on one {unit} (the compiler's fact)",
        *(collectives or ["  none"]),
        "",
        f"Time per step (an estimate: the compiler's cycles x trip counts at {device.clock_hz / 1e9:g} GHz;",
        "what has no cycles by bytes over bandwidth, a lower bound, as far as nothing else runs meanwhile)",
        *(f"  {kind:34} {seconds:9.4f} s" for kind, seconds in cost.seconds_by_kind().items()),
        *_describe_gaps(cost),
        f"  {'step':34} {cost.seconds:9.4f} s",
        f"  {plan.config.batch_size / cost.seconds:,.0f} examples/s, {100 * plan.mfu:.1f}% MFU "
        f"({plan.flops_per_example / 1e9:,.1f} GFLOP per example, peak {device.peak_flops / 1e12:g} TFLOP/s)",
    ]


def _describe_gaps(cost: CostEstimate) -> list[str]:
    """What the program does not say, if anything, and what the estimate assumes in its place."""
    gaps = {
        "loops have no known trip count: their bodies count once": cost.unknown_loops,
        "collectives do not say who takes part: they count as of all devices": cost.unknown_groups,
    }
    return [f"  {len(names)} {what}" for what, names in gaps.items() if names]


def describe_alternative(plan: Plan, alternative: Plan | None) -> str:
    """What to change so that it fits, in words."""
    if alternative is None:
        return "\nNothing tried makes it fit (remat=full, mesh.fsdp, microbatches): take more chips or a smaller batch."
    before = plan.settings
    flags = [f"--config.{name}={value}" for name, value in alternative.settings.items() if before[name] != value]
    return f"\nIt fits with {' '.join(flags)}:\n\n{describe(alternative)}"
