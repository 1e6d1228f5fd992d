"""Evaluate a CLIP model without training it for the task: zero-shot classification, and retrieval by captions.

python evaluate.py --config vit_b32 --datasets imagenet_v2 --output results.json
python evaluate.py --weights runs/demo --datasets shapes,digits --report report.html
python evaluate.py --weights ViT-B/32 --datasets wds_flickr30k,folder:photos --tasks retrieval
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import installed  # noqa: F401  (first: it says what to do where the requirements are missing)
from clip_jax import cli
from clip_jax.data.access import Access
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import accepted_names, evaluation_set
from clip_jax.weights import available_models


def main(argv: Sequence[str]) -> None:
    """Parse the flags, load the model, measure it on each data set, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights",
        metavar="W",
        help="an official name (ViT-B/32), a file of weights, a model folder of any known format, a training workdir "
        "(its newest step; WORKDIR@best; a step's folder) or a name on the hub (ORG/NAME); default: the official "
        "weights of the config's name",
    )
    parser.add_argument("--datasets", metavar="A,B,C", help=f"{accepted_names()}; default: the config's eval_datasets")
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="zeroshot, retrieval or both; default: zeroshot for a data set with named classes, retrieval for one with "
        "captions only",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the results here, in CLIP_benchmark's format")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with pictures here")
    flags, config = cli.parse(parser, argv, needs_config=False)
    weights = flags.weights or official_name(config)
    names = names_in(flags.datasets) or (config.eval_datasets if config else ())
    if not names:
        raise UserError(f"expected --datasets A,B,C, each {accepted_names()}")

    from clip_jax.evaluation.tasks import chosen_tasks

    access = config.access if config else Access(offline=flags.offline)
    datasets = [evaluation_set(name, access) for name in names]
    jobs = [(task, dataset) for dataset in datasets for task in chosen_tasks(dataset, names_in(flags.tasks))]
    for target in filter(None, (flags.output, flags.report)):
        make_parent(Path(target))
    if flags.report:
        from clip_jax.reports.zero_shot import write_report
        from clip_jax.workdir import BEST, read_metrics

        metrics = read_metrics(weights.removesuffix(BEST))  # before the evaluation: a damaged line must not cost it
    encoders, variables = load_encoders(weights, config)
    results = [task.run(encoders, variables, dataset) for task, dataset in jobs]
    for result in results:
        print(f"{result.dataset.name}: " + ", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items()))
    model = config.name if config else weights
    if flags.output:
        rows = [benchmark_row(result, model, weights) for result in results]
        Path(flags.output).write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    if flags.report:
        write_report(flags.report, f"clip_jax: {model}", metrics, results)
        print(f"report: {flags.report}")


def names_in(text: str | None) -> list[str]:
    """What commas separate."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def make_parent(target: Path) -> None:
    """The folder of a file to be written, made before the evaluation, not missed after it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() or not os.access(target.parent, os.W_OK):
            raise OSError("it is a folder" if target.is_dir() else f"{target.parent} cannot be written to")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; name another file") from error


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

    from clip_jax.evaluation.zero_shot import make_encoders
    from clip_jax.models import CLIP, Execution
    from clip_jax.options import kept_values
    from clip_jax.parallel import MeshConfig, make_partitioner
    from clip_jax.training.state import abstract_variables
    from clip_jax.weights import load_variables

    architecture, variables = load_variables(weights)
    if config and architecture != config.model:
        found, expected = kept_values(architecture), kept_values(config.model)
        name = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
        raise UserError(
            f"{weights} holds another model than the config {config.name}: its {name} is {found.get(name)!r}, the "
            f"config's {expected.get(name)!r}; leave --config out"
        )
    model = CLIP(architecture, config.execution if config else Execution())
    partitioner = make_partitioner(config.mesh if config else MeshConfig())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(model, partitioner))
    return make_encoders(model, partitioner), jax.device_put(variables, shardings)


def benchmark_row(result: Any, model: str, pretrained: str) -> dict[str, Any]:
    """One object of the list that CLIP_benchmark's tools read."""
    return {
        "dataset": result.dataset.name,
        "model": model,
        "pretrained": pretrained,
        "task": result.task,
        "language": "en",
        "metrics": result.metrics,
    }


if __name__ == "__main__":
    cli.run(main)
