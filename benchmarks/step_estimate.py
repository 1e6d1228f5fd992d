"""The train step's memory and time on a TPU slice by the compiler, with and without pieces.

    python -m benchmarks.step_estimate [--topology v5e-256] [--batch_size 32768] [CONFIG ...]

Compiles two steps per config (minutes each; no accelerator is needed) and prints a row of a Markdown table for each, as
in benchmarks/results/step_estimate.md: blocks that work on a device's whole share, one per iteration of the layer loop,
and the config as it is. Memory is the compiler's fact, time an estimate (see clip_jax/planner/schedule.py).
"""

import argparse

from clip_jax.cli import load_config
from clip_jax.planner.compile import make_plan, use_compiler_only
from clip_jax.planner.plan import Plan
from clip_jax.planner.topologies import GIB, parse_topology

WHOLE = {"block_tokens": "0", "unroll": "1"}
HEAD = (
    "| config | batch | block_tokens | unroll | state and batch, GiB | temporaries, GiB | peak, GiB | step, s | MFU |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", default=["vit_l14"], help="names in configs/")
    parser.add_argument("--topology", default="v5e-256")
    parser.add_argument("--batch_size", default="32768")
    flags = parser.parse_args()
    use_compiler_only()
    topology = parse_topology(flags.topology)
    print(HEAD)
    for name in flags.configs:
        for changes in (WHOLE, {}):
            config = load_config(name, {**changes, "batch_size": flags.batch_size})
            print(row(name, make_plan(config, topology)), flush=True)


def row(name: str, plan: Plan) -> str:
    """One line of the table."""
    execution, memory = plan.config.execution, plan.memory
    gib = [f"{size / GIB:.2f}" for size in (memory.arguments, memory.temporaries, memory.peak)]
    time = [f"{plan.cost.seconds:.3f}", f"{plan.mfu:.3f}"] if plan.cost else ["does not fit", ""]
    cells = [name, f"{plan.config.batch_size:,}", str(execution.block_tokens), str(execution.unroll), *gib, *time]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
