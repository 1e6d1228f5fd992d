"""Evaluate a CLIP model without training it for the task: zero-shot classification.

python evaluate.py --config vit_b32 --datasets imagenet_v2 --output results.json
python evaluate.py --config demo --weights runs/demo --report report.html
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_jax import cli
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import accepted_names, evaluation_set


def main(argv: Sequence[str]) -> None:
    """Parse the flags, load the model, measure it on each data set, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights",
        help="an official name (ViT-B/32), a weights file, a converted checkpoint or a training workdir; "
        "default: the official weights of the config's name",
    )
    parser.add_argument(
        "--datasets",
        metavar="A,B,C",
        help=f"{accepted_names()}; default: the config's eval_datasets",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the results here, in CLIP_benchmark's format")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with pictures here")
    flags, values = cli.parse(parser, argv)

    from clip_jax.evaluation.zero_shot import make_encoders, zero_shot
    from clip_jax.models import CLIP
    from clip_jax.parallel import make_partitioner
    from clip_jax.training.config import RunConfig
    from clip_jax.training.state import abstract_variables

    config = RunConfig.from_dict(values.to_dict())
    names = flags.datasets.split(",") if flags.datasets else config.eval_datasets
    datasets = [evaluation_set(name, config.data_dir) for name in names]
    weights = flags.weights or config.name
    model, partitioner = CLIP(config.model, config.execution), make_partitioner(config.mesh)
    variables = load_weights(weights, config, abstract_variables(model, partitioner))
    encoders = make_encoders(model, partitioner)
    results = [zero_shot(encoders, variables, dataset) for dataset in datasets]
    for result in results:
        print(f"{result.dataset.name}: " + ", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items()))
    if flags.output:
        rows = [benchmark_row(result, config.name, weights) for result in results]
        Path(flags.output).write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    if flags.report:
        from clip_jax.reports.zero_shot import write_report
        from clip_jax.training.metrics import read_metrics

        write_report(flags.report, f"clip_jax: {config.name}", read_metrics(weights), results)
        print(f"report: {flags.report}")


def load_weights(weights: str, config: Any, like: Any) -> Any:
    """The variables that --weights names, sharded like `like`; they must be those of the config's model."""
    import jax

    from clip_jax.weights import load_variables

    model_config, variables = load_variables(weights)
    if model_config != config.model:
        raise UserError(f"{weights} holds another model than the config {config.name}: {model_config}")
    return jax.device_put(variables, jax.tree.map(lambda leaf: leaf.sharding, like))


def benchmark_row(result: Any, model: str, pretrained: str) -> dict[str, Any]:
    """One object of the list that CLIP_benchmark's tools read."""
    return {
        "dataset": result.dataset.name,
        "model": model,
        "pretrained": pretrained,
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": result.metrics,
    }


if __name__ == "__main__":
    cli.run(main)
