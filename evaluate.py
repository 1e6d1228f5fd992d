"""Evaluate a CLIP model: its own head, zero-shot classification, retrieval by captions, linear probe and few-shot.

python evaluate.py --config vit_b32 --datasets imagenet_v2 --output results.json
python evaluate.py --weights runs/demo --datasets shapes,digits --report report.html
python evaluate.py --config vit_b32 --datasets paper27
python evaluate.py --weights ViT-B/32 --datasets wds_flickr30k,folder:photos --tasks retrieval
python evaluate.py --weights ViT-B/32 --images a.jpg b.jpg --labels "a cup,not a cup"

On a TPU pod or under Slurm, start this on every host: each reads its part of the data, and the first one says what came
of it. Elsewhere tell each process who it is with --coordinator, --processes and --process_index.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import installed  # noqa: F401  (first: it says what to do where the requirements are missing)
from clip_jax import cli
from clip_jax.data.access import Access
from clip_jax.distributed import is_first, on_first_process, together
from clip_jax.errors import UserError
from clip_jax.evaluation import prompts
from clip_jax.evaluation.datasets import accepted_names, evaluation_set, expanded
from clip_jax.evaluation.rows import row_of, table, write_rows
from clip_jax.platform import keep_compiled_programs
from clip_jax.weights import available_models, head_classes
from clip_jax.workdir import read_metrics, without_suffixes

if TYPE_CHECKING:
    from clip_jax.evaluation.tasks import Result


def main(argv: Sequence[str]) -> int:
    """Parse the flags, then evaluate data sets or classify images; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights",
        metavar="W",
        help="an official name (ViT-B/32), a file of weights, a model folder of any known format, a training workdir "
        "(its newest step; WORKDIR@best; a step's folder; each with @ema for the moving average) or a name on the hub "
        "(ORG/NAME); default: the official weights of the config's name",
    )
    parser.add_argument("--datasets", metavar="A,B,C", help=f"{accepted_names()}; default: the config's eval_datasets")
    parser.add_argument(
        "--tasks",
        metavar="A,B,C",
        help="of head (the model's own classifier, which must have all classes of the data set), zeroshot, retrieval, "
        "linear_probe, few_shot (these two need a training split); default: the first that suits a data set, so "
        "retrieval where there are captions only",
    )
    parser.add_argument(
        "--class_names", metavar="FILE", help="what the prompts call the classes of the one data set, a name a line"
    )
    parser.add_argument(
        "--templates", metavar="FILE_OR_TEXT", help="prompts in place of the data sets' own, as 'a photo of a {}.'"
    )
    parser.add_argument(
        "--output", metavar="FILE.json", help="write the results here, in CLIP_benchmark's format; or FILE.csv"
    )
    parser.add_argument("--report", metavar="FILE.html", help="write a page with pictures here")
    parser.add_argument(
        "--images", metavar="FILE", nargs="+", help="instead of data sets: say which of --labels fit these images"
    )
    parser.add_argument("--labels", metavar="A,B,C", help="texts to compare --images with, as 'a cup,not a cup'")
    cli.add_process_flags(parser)
    flags, config = cli.parse(parser, argv, needs_config=False)
    keep_compiled_programs()
    weights = flags.weights or official_name(config)
    cli.join_processes(flags)
    if flags.images or flags.labels:
        classify_images(flags, config, weights)
        return 0
    return evaluate(flags, config, weights)


def classify_images(flags: argparse.Namespace, config: Any, weights: str) -> None:
    """Print the probabilities of the labels for each image."""
    from clip_jax.evaluation.classify import check_labels, classify

    labels = names_in(flags.labels)
    if not flags.images or flags.datasets:
        raise UserError("--labels goes with --images FILE ..., and neither with --datasets")
    check_labels(labels)
    make_parents(flags)
    encoders, variables = load_encoders(weights, config)
    result = classify(encoders, variables, flags.images, labels, is_first())
    if not is_first():
        return
    for number, image in enumerate(result.images):
        print(f"{image}: " + ", ".join(f"{label} {100 * value:.1f}%" for label, value in result.best(number)))
    if flags.report:
        from clip_jax.reports.classify import write_classification

        write_classification(flags.report, f"clip_jax: {config.name if config else weights}", result)
        print(f"report: {flags.report}")


def evaluate(flags: argparse.Namespace, config: Any, weights: str) -> int:
    """Measure the model on each data set; returns 1 if one of several could not be evaluated, else 0."""
    names = expanded(names_in(flags.datasets) or (config.eval_datasets if config else ()))
    if not names:
        raise UserError(f"expected --datasets A,B,C, each {accepted_names()}")
    if flags.class_names and len(names) > 1:
        raise UserError(f"--class_names names the classes of one data set, but --datasets has {len(names)}")

    from clip_jax.evaluation.tasks import chosen_tasks

    access = config.access if config else Access(offline=flags.offline)
    class_names = together(partial(prompts.lines_of, flags.class_names)) if flags.class_names else ()
    templates = together(partial(prompts.templates_from, flags.templates)) if flags.templates else ()
    failed: list[str] = []
    datasets, jobs = [], []
    for name in names:
        with tolerated(name, names, failed):
            datasets.append(together(partial(evaluation_set, name, access, class_names, templates)))
    classes = together(partial(head_classes, weights))
    for dataset in datasets:
        for asked in [[task] for task in names_in(flags.tasks)] or [[]]:
            with tolerated(dataset.name, names, failed):
                jobs += [(task, dataset) for task in together(partial(chosen_tasks, dataset, asked, classes))]
    if not jobs:
        return 1
    make_parents(flags)
    # Before the evaluation: a damaged line must not cost it.
    metrics = on_first_process(partial(read_metrics, without_suffixes(weights)[0])) if flags.report else []
    encoders, variables = load_encoders(weights, config)
    checked = []
    for task, dataset in jobs:
        with tolerated(dataset.name, names, failed):
            task.check(encoders, dataset)
            checked.append((task, dataset))
    results = []
    for task, dataset in checked:
        with tolerated(dataset.name, names, failed):
            results.append(task.run(encoders, variables, dataset, is_first()))
    if is_first():
        publish(flags, config.name if config else weights, weights, metrics, results)
    return 1 if failed else 0


def publish(
    flags: argparse.Namespace,
    model: str,
    weights: str,
    metrics: Sequence[Mapping[str, Any]],
    results: Sequence["Result"],
) -> None:
    """Say what came of the evaluation: on the terminal, in --output and in --report.

    Args:
      flags: where to.
      model: its name.
      weights: where they are from.
      metrics: of its training, for the report.
      results: of all data sets that could be evaluated.

    Raises:
      UserError: a metric is not finite.
    """
    rows = [row_of(result, model, weights) for result in results]
    if rows:
        print(table(rows))
    if flags.output:
        write_rows(flags.output, rows)
    if flags.report:
        from clip_jax.reports.evaluation import write_report

        write_report(flags.report, f"clip_jax: {model}", metrics, results)
        print(f"report: {flags.report}")


def make_parents(flags: argparse.Namespace) -> None:
    """The folders of what is to be written, made before the evaluation, not missed after it."""
    for target in filter(None, (flags.output, flags.report)):
        on_first_process(partial(cli.make_parent, target))


@contextmanager
def tolerated(name: str, names: Sequence[str], failed: list[str]) -> Iterator[None]:
    """Report what is wrong with one data set of several, so that the others still run."""
    try:
        yield
    except UserError as error:
        if len(names) == 1:
            raise
        failed.append(name)
        if is_first():
            print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)


def names_in(text: str | None) -> list[str]:
    """What commas separate."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def official_name(config: Any) -> str:
    """What to evaluate where --weights is not given."""
    if config is None:
        raise UserError("expected --weights W, or --config NAME for the official weights of a model; got neither")
    if config.name not in available_models():
        raise UserError(
            f"{config.name} is not an official model, so --weights must say what to evaluate: the workdir that "
            f"train.py wrote, for example --weights runs/{config.name}"
        )
    return config.name


def load_encoders(weights: str, config: Any) -> tuple[Any, Any]:
    """The model that --weights names, ready to run as the config says, and its variables on the mesh."""
    import jax

    from clip_jax.evaluation.encoders import make_encoders
    from clip_jax.models import CLIP, Execution
    from clip_jax.options import kept_values
    from clip_jax.parallel import MeshConfig, make_partitioner
    from clip_jax.training.state import abstract_variables
    from clip_jax.weights import load_variables

    found_model, variables = together(partial(load_variables, weights))
    model_config = config and replace(config.model, classes=config.model.classes or found_model.classes)
    if config and found_model != model_config:
        found, expected = kept_values(found_model), kept_values(model_config)
        name = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
        raise UserError(
            f"{weights} holds another model than the config {config.name}: its {name} is {found.get(name)!r}, the "
            f"config's {expected.get(name)!r}; leave --config out"
        )
    model = CLIP(found_model, config.execution if config else Execution())
    partitioner = make_partitioner(config.mesh if config else MeshConfig())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(model, partitioner))
    return make_encoders(model, partitioner), jax.device_put(variables, shardings)


if __name__ == "__main__":
    cli.run(main)
