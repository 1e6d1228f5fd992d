"""The train step's time on a TPU slice by the compiler's estimate, with plain attention and by head.

    python -m benchmarks.step_estimate [--topology v5e-256] [--batch_size 32768] [CONFIG ...]

Compiles two steps a config (minutes each; no accelerator is needed) and prints a row of a Markdown table for each, as
in benchmarks/results/step_estimate.md. Parameters and moments are split over all chips (mesh.fsdp).
"""

import argparse

from clip_jax.cli import load_config, override
from clip_jax.training.ahead_of_time import make_plan, use_compiler_only
from clip_jax.training.config import RunConfig
from clip_jax.training.topologies import GIB, parse_topology


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", default=["vit_l14"], help="names in configs/")
    parser.add_argument("--topology", default="v5e-256")
    parser.add_argument("--batch_size", default="32768")
    flags = parser.parse_args()
    use_compiler_only()
    topology = parse_topology(flags.topology)
    print("| config | batch | attention | GiB a chip | step, s | MFU |\n|---|---|---|---|---|---|")
    for name in flags.configs:
        for attention in ("xla", "by_head"):
            changes = {"batch_size": flags.batch_size, "attention": attention, "mesh.data": "1", "mesh.fsdp": "-1"}
            config = RunConfig.from_dict(override(load_config(name), list(changes.items())).to_dict())
            plan = make_plan(config, topology)
            time = f"{plan.cost.seconds:.3f} | {plan.mfu:.3f}" if plan.cost else "does not fit |"
            row = f"| {name} | {config.batch_size:,} | {attention} | {plan.memory.peak / GIB:.2f} | {time} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
