"""Train a CLIP model, or plan its training on a TPU pod.

  python train.py --config demo --workdir runs/demo
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
from clip_jax.workdir import EVAL, EVAL_EMA


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
    from clip_jax.training.head import with_classes

    config = with_classes(config)
    if flags.check_data:
        check_data(config)
        return
    if not flags.workdir and not flags.plan:
        raise UserError("expected --workdir DIR to train in, or --plan TOPOLOGY; got neither")
    if flags.plan_output and not flags.plan:
        raise UserError("--plan_output writes what --plan TOPOLOGY makes; give both")
    if flags.plan:
        from clip_jax.planner.report import main_plan

        main_plan(config, flags.plan, flags.plan_output)
        return
    from clip_jax.training.run import run

    keep_compiled_programs()
    cli.join_processes(flags)
    run(config, flags.workdir, zero_shot_evaluation if config.eval_datasets else None, start_of_head)


def check_data(config: Any) -> None:
    """Report what is damaged in the training data.

    Raises:
      UserError: something is, and the run would stop at it.
    """
    from clip_jax.data.check import check
    from clip_jax.training.run import make_reader

    reader = make_reader(config)
    results = check(reader.mixture.sources, reader.target)
    for result in results:
        print("\n".join(result.lines()))
    damaged = sum(result.damage.total() for result in results)
    if damaged and config.input.on_damage == "stop":
        raise UserError(f"{damaged} damaged; mend the data, or train with --config.on_damage=skip")


def zero_shot_evaluation(config: Any, training: Any) -> Any:
    """What training calls every `eval_every` steps: accuracy on the config's data sets.

    Images are classified by the model's head where it has all classes of the data set, and zero-shot elsewhere. Where
    the run keeps an average of the weights, it is measured as well, under keys of its own.
    """
    from clip_jax.distributed import together
    from clip_jax.evaluation.datasets import evaluation_set
    from clip_jax.evaluation.encoders import make_encoders
    from clip_jax.evaluation.head import classifies
    from clip_jax.evaluation.tasks import chosen_tasks
    from clip_jax.evaluation.zero_shot import check_prompts

    encoders = make_encoders(training.model, training.partitioner)
    datasets = together(lambda: [evaluation_set(name, config.access) for name in config.eval_datasets])
    for dataset in datasets:
        chosen_tasks(dataset, ["zeroshot"])
        check_prompts(encoders, dataset)
    classify = {dataset.name: classifies(encoders, dataset) for dataset in datasets}

    def evaluate(state: Any) -> dict[str, float]:
        models = {EVAL: state.variables, **({EVAL_EMA: state.ema_variables} if training.ema_decay else {})}
        return {
            f"{prefix}{dataset.name}/{metric}": value
            for prefix, variables in models.items()
            for dataset in datasets
            for metric, value in classify[dataset.name](encoders, variables, dataset, progress=False).metrics.items()
        }

    return evaluate


def start_of_head(config: Any, training: Any, reader: Any) -> Any:
    """What makes the head of a run that starts from a model without one: a function of that model's weights."""
    from functools import partial

    from clip_jax.distributed import together
    from clip_jax.evaluation.datasets import evaluation_set
    from clip_jax.evaluation.encoders import make_encoders
    from clip_jax.evaluation.head import check_head_prompts, linear_probe_head, templates_for, zero_shot_head

    encoders, sources = make_encoders(training.model, training.partitioner), reader.mixture.sources
    if config.init.head_from == "linear_probe":
        return partial(linear_probe_head, encoders, sources=sources)
    datasets = together(lambda: [evaluation_set(name, config.access) for name in config.eval_datasets])
    templates = templates_for(config.model.classes, sources, datasets)
    check_head_prompts(encoders, templates)
    return partial(zero_shot_head, encoders, templates=templates)


if __name__ == "__main__":
    cli.run(main)
