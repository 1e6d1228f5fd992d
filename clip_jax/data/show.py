"""Print the samples of one training batch, and show them as training sees them.

  python -m clip_jax.data.show --config demo --batch 0
  python -m clip_jax.data.show --config demo --batch 100 --report batch.html

Batch 0 is what the first step reads. Each line is a sample: its position in the global order, its data set, its number
there, its name there, and the caption that was drawn.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clip_jax import cli
from clip_jax.data.damage import counted
from clip_jax.errors import UserError
from clip_jax.training.resolve import resolved
from clip_jax.training.run import make_reader


def main(argv: Sequence[str]) -> None:
    """Parse the flags, read the batch, print it, write the page that was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.data.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="which one; by default 0, the first")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with pictures and captions here")
    flags, config = cli.parse(parser, argv)
    config = resolved(config)
    if flags.batch < 0:
        raise UserError(f"--batch must be at least 0, got {flags.batch}")
    reader = replace(make_reader(config), skip=config.input.on_damage == "skip")
    first, damage = flags.batch * config.batch_size, Counter()
    samples = []
    for position in range(first, first + config.batch_size):
        (sample,) = reader.samples(np.array([position]), damage)
        samples.append(sample)
        name = f" {sample.key}" if sample.key else ""
        print(f"{position} {sample.source} {sample.index}{name}: {sample.caption}")
    if damage:
        print(f"replaced, because they are damaged: {counted(damage)}")
    if flags.report:
        from clip_jax.reports.batch import write_batch

        title = f"Batch {flags.batch} of {config.name}"
        write_batch(flags.report, title, first, samples, counted(damage))


if __name__ == "__main__":
    cli.run(main)
