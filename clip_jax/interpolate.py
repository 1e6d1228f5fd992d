"""Interpolate the weights of two models (WiSE-FT, arXiv 2109.01903): (1 - alpha) * A + alpha * B.

  python -m clip_jax.interpolate ViT-B/32 runs/cups cups_half --alpha 0.5

With a zero-shot model A and what was fine-tuned from it B, alpha 0.5 mostly keeps what A knew of other images at little
cost on B's. A model with a classification head is interpolated with WORKDIR/start of its run, which has the head's
first weights. A and B are whatever clip_jax.load opens: an official name, a file or folder of weights, a name on the
Hugging Face hub, a model folder, a training workdir (its newest step), WORKDIR@best or one step's folder, each with
@ema for the moving average of the weights. DST must not exist and becomes a model folder.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from clip_jax import cli, model_folder
from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.options import kept_values
from clip_jax.weights import load_variables


def interpolate(a: Any, b: Any, alpha: float) -> Any:
    """(1 - alpha) * a + alpha * b, array by array in float32.

    Running statistics of BatchNorm are interpolated like the parameters, as WiSE-FT does with a state dict.

    Args:
      a: variables of a model.
      b: those of another of the same architecture.
      alpha: from 0, which gives `a`, to 1.
    """
    return jax.tree.map(lambda x, y: np.float32(1 - alpha) * x + np.float32(alpha) * y, a, b)


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
    """Parse the flags, interpolate, write."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.interpolate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="the model that alpha 0 gives")
    parser.add_argument("b", metavar="B", help="the model that alpha 1 gives")
    parser.add_argument("target", metavar="DST", help="where to write the model folder")
    parser.add_argument("--alpha", type=float, default=0.5, help="how much of B, from 0 to 1 (default: 0.5)")
    flags = parser.parse_args(argv)
    if not 0 <= flags.alpha <= 1:
        raise UserError(f"--alpha must be from 0 to 1, got {flags.alpha}")
    (a_config, a), (b_config, b) = load_variables(flags.a), load_variables(flags.b)
    check_same_architecture((flags.a, a_config), (flags.b, b_config))
    model_folder.write(flags.target, a_config, interpolate(a, b, flags.alpha))
    print(f"{1 - flags.alpha:g} * {flags.a} + {flags.alpha:g} * {flags.b} -> {flags.target}")


if __name__ == "__main__":
    cli.run(main)
