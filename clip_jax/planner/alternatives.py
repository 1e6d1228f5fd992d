"""What to change where a plan does not fit."""

import dataclasses

from clip_jax.planner.compile import make_plan
from clip_jax.planner.plan import Plan
from clip_jax.training.config import RunConfig


def first_that_fits(plan: Plan) -> Plan | None:
    """Change a plan that does not fit, step by step, and compiles every step; None if nothing is left to change."""
    while config := next_change(plan):
        plan = make_plan(config, plan.topology)
        if plan.fits:
            return plan
    return None


def next_change(plan: Plan) -> RunConfig | None:
    """What to try where a plan does not fit, the cheapest in speed first: rematerialisation, fsdp, micro-batches.

    What cannot suffice is left out: fsdp splits the state and its gradients but no activations, and micro-batches
    shrink the temporaries in proportion at most.
    """
    config, memory, limit = plan.config, plan.memory, plan.topology.device.hbm_limit
    slices, microbatches = plan.topology.slices, config.microbatches
    data, fsdp, _ = config.mesh.resolve(plan.devices // slices)
    if config.execution.remat != "full":
        return dataclasses.replace(config, execution=dataclasses.replace(config.execution, remat="full"))
    if fsdp == 1 and data > 1 and memory.temporaries - memory.arguments < limit:
        mesh = dataclasses.replace(config.mesh, data=1, fsdp=data)
        return dataclasses.replace(config, mesh=mesh)
    pieces = 2 * microbatches
    while pieces < microbatches * memory.temporaries / limit:
        pieces *= 2
    if config.batch_size // (slices * data * fsdp) % pieces == 0:
        return dataclasses.replace(config, microbatches=pieces)
    return None
