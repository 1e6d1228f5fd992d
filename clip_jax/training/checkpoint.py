"""Look after the checkpoints of a run.

python -m clip_jax.training.checkpoint verify runs/demo
"""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from clip_jax import cli
from clip_jax.errors import UserError
from clip_jax.training.step_folder import verify
from clip_jax.workdir import CHECKPOINTS, absolute, finished_steps


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and verify; returns 1 if a checkpoint is damaged, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.training.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["verify"], help="compare all files and arrays with what was written")
    parser.add_argument("workdir", help="of a run")
    flags = parser.parse_args(argv)
    folder = absolute(flags.workdir) / CHECKPOINTS
    damaged = 0
    for step in tqdm(finished_steps(flags.workdir), desc="verifying", unit="checkpoint", disable=None):
        try:
            verify(folder / str(step))
            tqdm.write(f"step {step}: whole")
        except (UserError, OSError) as error:
            if (folder / str(step)).is_dir():  # else a run that goes on has removed it meanwhile
                damaged += 1
                tqdm.write(f"step {step}: {error}")
    return 1 if damaged else 0


if __name__ == "__main__":
    cli.run(main)
