"""Interpolate the weights of two models (WiSE-FT, arXiv 2109.01903): (1 - alpha) * A + alpha * B.

  python -m clip_jax.interpolate ViT-B/32 runs/cups cups_half --alpha 0.5
  python -m clip_jax.interpolate runs/cups/start runs/cups --datasets held_out:runs/cups,cifar100 --report curve.html

With a zero-shot model A and what was fine-tuned from it B, alpha 0.5 mostly keeps what A knew of other images at little
cost on B's; --datasets says what each alpha costs. A model with a classification head is interpolated with
WORKDIR/start of its run, which has the head's first weights. A and B are whatever clip_jax.load opens: an official
name, a file or folder of weights, a name on the Hugging Face hub, a model folder, a training workdir (its newest step),
WORKDIR@best or one step's folder, each with @ema for the moving average of the weights. DST must not exist and becomes
a model folder.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from clip_jax import cli, model_folder
from clip_jax.errors import UserError
from clip_jax.evaluation.wise_ft import interpolate
from clip_jax.models import CLIPConfig
from clip_jax.options import kept_values
from clip_jax.weights import load_variables


def check_same_architecture(a: tuple[str, CLIPConfig], b: tuple[str, CLIPConfig]) -> None:
    """See that two models differ in nothing but their weights.

    Args:
      a: the name of a model, for the message, and its configuration.
      b: likewise.

    Raises:
      UserError: they differ; the message names in what.
    """
    if a[1].classes != b[1].classes:
        heads = " and ".join(f"{name} has {_head(config)}" for name, config in (a, b))
        raise UserError(
            f"only heads of the same classes can be interpolated, but {heads}; what a run started from, with the first "
            "weights of its head, is WORKDIR/start"
        )
    (a_name, ours), (b_name, theirs) = ((name, kept_values(config)) for name, config in (a, b))
    for field in sorted({**ours, **theirs}):
        if ours.get(field) != theirs.get(field):
            raise UserError(
                f"only models that are alike can be interpolated, but {a_name} has {field}={ours.get(field)!r} and "
                f"{b_name} has {theirs.get(field)!r}"
            )


def _head(config: CLIPConfig) -> str:
    names = ", ".join(config.classes[:3]) + ", ..." * (len(config.classes) > 3)
    return f"one of {len(config.classes)} ({names})" if config.classes else "none"


def main(argv: Sequence[str]) -> None:
    """Parse the flags; interpolate and write, or judge what is between."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.interpolate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="the model that alpha 0 gives")
    parser.add_argument("b", metavar="B", help="the model that alpha 1 gives")
    parser.add_argument("target", metavar="DST", nargs="?", help="where to write the model folder")
    parser.add_argument("--alpha", type=float, default=0.5, help="how much of B, from 0 to 1 (default: 0.5)")
    parser.add_argument(
        "--datasets",
        metavar="A,B,C",
        help="judge the models of alpha 0, 0.1, ... 1 on these, as evaluate.py names them: a target, then references",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write what --datasets gives here; or FILE.csv")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with its picture here")
    flags = parser.parse_args(argv)
    if not 0 <= flags.alpha <= 1:
        raise UserError(f"--alpha must be from 0 to 1, got {flags.alpha}")
    if not (flags.target or flags.datasets):
        raise UserError("expected DST to write a model to, or --datasets A,B,C to judge what is between A and B")
    (a_config, a), (b_config, b) = load_variables(flags.a), load_variables(flags.b)
    check_same_architecture((flags.a, a_config), (flags.b, b_config))
    if flags.target:
        model_folder.write(flags.target, a_config, interpolate(a, b, flags.alpha))
        print(f"{1 - flags.alpha:g} * {flags.a} + {flags.alpha:g} * {flags.b} -> {flags.target}")
    if flags.datasets:
        judge_between(flags, a_config, a, b)


def judge_between(flags: argparse.Namespace, config: CLIPConfig, a: Any, b: Any) -> None:
    """Print the curve of alpha, and write what else is asked for.

    Raises:
      UserError: a data set that is missing or has neither classes nor captions.
    """
    import jax

    from clip_jax.evaluation.alpha_curve import alpha_curve, table
    from clip_jax.evaluation.datasets import evaluation_set
    from clip_jax.evaluation.encoders import make_encoders
    from clip_jax.evaluation.judge import check_judge
    from clip_jax.evaluation.rows import write_rows
    from clip_jax.models import CLIP, Execution
    from clip_jax.parallel import MeshConfig, make_partitioner
    from clip_jax.training.state import abstract_variables

    for path in filter(None, (flags.output, flags.report)):
        cli.make_parent(path)
    datasets = [evaluation_set(name.strip()) for name in flags.datasets.split(",")]
    model, partitioner = CLIP(config, Execution()), make_partitioner(MeshConfig())
    encoders = make_encoders(model, partitioner)
    for dataset in datasets:
        check_judge(encoders, dataset)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(model, partitioner))
    curve = alpha_curve(encoders, *map(partial(jax.device_put, device=shardings), (a, b)), datasets)
    print(table(curve))
    if flags.output:
        write_rows(flags.output, curve.rows())
    if flags.report:
        from clip_jax.reports.alpha_curve import write_alpha_curve

        write_alpha_curve(flags.report, f"Between {flags.a} and {flags.b}", curve)
        print(f"report: {flags.report}")


if __name__ == "__main__":
    cli.run(main)
