"""What the nine models need on TPU slices, by the planner.

    python -m benchmarks.plan_table [--again] [JOB ...]

Compiles the train step of every job below (a minute or more each) and writes the table in docs/pods.md. A job's plan is
kept in benchmarks/results/plans/ and not made again, unless with --again. No accelerator is needed.
"""

import argparse
import json
from importlib import metadata
from pathlib import Path

from clip_jax.cli import load_config
from clip_jax.planner.compile import make_plan, use_compiler_only
from clip_jax.planner.topologies import GIB, parse_topology

PLANS = Path(__file__).parent / "results" / "plans"
PAGE = Path(__file__).parent.parent / "docs" / "pods.md"
MODELS = ("vit_b32", "rn50", "vit_b16", "rn101", "vit_l14", "rn50x4", "vit_l14_336", "rn50x16", "rn50x64")
# Name of a job -> config, topology, overrides.
JOBS = {
    **{name: (name, "v5e-256", {}) for name in MODELS},
    "vit_l14_131072": ("vit_l14", "v5e-256", {"batch_size": 131_072}),
    "vit_l14_16777216": ("vit_l14", "v5p-512", {"batch_size": 16_777_216, "microbatches": 256}),
    **{f"vit_b32_{topology}": ("vit_b32", topology, {}) for topology in ("v3-512", "v4-512", "v5p-512", "v6e-256")},
    "vit_b32_tpu7x-256": ("vit_b32", "tpu7x-256", {}),
    "vit_b32_2xv5e-256": ("vit_b32", "2xv5e-256", {}),
    **{f"vit_b32_v5e-{chips}": ("vit_b32", f"v5e-{chips}", {"batch_size": 128 * chips}) for chips in (4, 16, 64)},
}
START, END = "<!-- plans -->", "<!-- end of plans -->"
HEAD = (
    "| model | topology | batch | settings | state and batch, GiB | temporaries, GiB | peak, GiB | of | "
    "collectives, GiB | step, s | examples/s | MFU | compiled in, s |"
)
RULE = "|---|---|---:|---|" + "---:|" * 9


def main() -> None:
    """Make the plans that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)}; all by default")
    parser.add_argument("--again", action="store_true", help="compile even where there is a plan")
    flags = parser.parse_args()
    use_compiler_only()
    PLANS.mkdir(parents=True, exist_ok=True)
    for name in flags.jobs or JOBS:
        file = PLANS / f"{name}.json"
        if flags.again or not file.exists():
            config, topology, overrides = JOBS[name]
            values = {field: str(value) for field, value in overrides.items()}
            plan = make_plan(load_config(config, values), parse_topology(topology))
            file.write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
        write_table()


def write_table() -> None:
    """Between the marks in docs/pods.md, from the plans that exist."""
    files = [PLANS / f"{name}.json" for name in JOBS]
    rows = [row(json.loads(file.read_text())) for file in files if file.exists()]
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("jax", "libtpu"))
    heading = f"With {versions}; a device is a chip, on v3 and tpu7x a core."
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n".join([START, heading, "", HEAD, RULE, *rows, "", END]) + after)


def row(plan: dict) -> str:
    """One line of the table."""
    settings = plan["settings"]
    mesh = "x".join(str(settings[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor"))
    loop = f"block_tokens {settings['block_tokens']:,}, unroll {settings['unroll']}"
    chosen = f"mesh {mesh}, remat {settings['remat']}, {loop}, microbatches {settings['microbatches']}"
    gib = [f"{plan[f'hbm_bytes_{kind}'] / GIB:.2f}" for kind in ("arguments", "temporaries", "peak", "limit")]
    cells = [plan["model"], plan["topology"], f"{plan['global_batch']:,}", chosen, *gib]
    if plan["collectives"] is None:
        return f"| {' | '.join(cells)} | | does not fit | | | |"
    traffic = sum(collective["bytes"] for collective in plan["collectives"].values()) / GIB
    cells += [f"{traffic:.2f}", f"{plan['estimated_step_seconds']:.3f}"]
    cells += [f"{plan['estimated_examples_per_second']:,.0f}", f"{plan['estimated_mfu']:.1%}"]
    return f"| {' | '.join(cells)} | {plan['compile_seconds']:.0f} |"


if __name__ == "__main__":
    main()
