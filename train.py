"""Train a CLIP model, or plan its training on a TPU pod.

  python train.py --config demo --workdir runs/demo
  python train.py --config finetune --workdir runs/cups --config.data.folder.path=PHOTOS
  python train.py --config vit_l14 --plan v5e-256
  python train.py --config mine --check_data

The run resumes by itself when --workdir already holds a run of the same config. On a TPU pod or under Slurm, start
this on every host; elsewhere tell each process who it is with --coordinator, --processes and --process_index.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import installed  # noqa: F401  (first: it says what to do where the requirements are missing)
from clip_jax import cli
from clip_jax.errors import UserError
from clip_jax.platform import keep_compiled_programs


def main(argv: Sequence[str]) -> None:
    """Parse the flags, then train or plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="where checkpoints, metrics and the configuration go (a folder or gs://...)")
    parser.add_argument(
        "--plan",
        metavar="TOPOLOGY",
        help="compile the train step for this TPU topology (v5e-256, v4-512, 2xv5e-256 for two slices) and print what "
        "it needs; no accelerator is used",
    )
    parser.add_argument(
        "--check_data",
        action="store_true",
        help="read all training data once and say what is damaged, instead of training; one machine is enough",
    )
    parser.add_argument("--plan_output", metavar="FILE.json", help="also write the plan here")
    cli.add_process_flags(parser)
    flags, config = cli.parse(parser, argv)
    if flags.check_data:
        check_data(config)
        return
    if not flags.workdir and not flags.plan:
        raise UserError("expected --workdir DIR to train in, or --plan TOPOLOGY; got neither")
    if flags.plan_output and not flags.plan:
        raise UserError("--plan_output writes what --plan TOPOLOGY makes; give both")
    if flags.plan:
        from clip_jax.planner.report import main_plan
        from clip_jax.training.resolve import with_classes

        main_plan(with_classes(config), flags.plan, flags.plan_output)
        return
    from clip_jax.distributed import together
    from clip_jax.judged_run import train
    from clip_jax.training.resolve import resolved

    keep_compiled_programs()
    cli.join_processes(flags)
    train(together(lambda: resolved(config)), flags.workdir)


def check_data(config: Any) -> None:
    """Report what is damaged in the training data, and in what is held out of it.

    Raises:
      UserError: something is, and the run would stop at it.
    """
    from clip_jax.data.check import check
    from clip_jax.data.sources import held_out_of
    from clip_jax.training.resolve import with_classes
    from clip_jax.training.run import make_reader

    reader = make_reader(with_classes(config))
    held_out = [source.divided()[1] for source in held_out_of(config.data).values()]
    results = check([*reader.mixture.sources, *held_out], reader.target)
    for result in results:
        print("\n".join(result.lines()))
    damaged = sum(result.damage.total() for result in results)
    if damaged and config.input.on_damage == "stop":
        raise UserError(f"{damaged} damaged; mend the data, or train with --config.on_damage=skip")


if __name__ == "__main__":
    cli.run(main)
