"""A model that learns something new, by recipes that people use: what it learned, and what it forgot.

    python -m benchmarks.adaptation [--seeds 0 1 2] [--methods NAME ...] [--folder runs/adaptation]
    python -m benchmarks.adaptation --grid

Pre-trains the demo's model on shapes and on the digits 0 to 4, once for each seed; adapts it to the digits 5 to 9 from
a few images each, by every method; judges it on images held out. The peak rates in `METHODS` come from seed 0, by
`--grid`. Results are kept in the folder, a file for each method and seed, so that the work can be done in parts; what
is there is written to benchmarks/results/adaptation.md, with a picture beside it.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import optax

from benchmarks import adaptation_data as data
from benchmarks.adaptation_table import kept_of, write
from clip_jax.cli import load_config
from clip_jax.evaluation.encoders import Variables, make_encoders
from clip_jax.evaluation.head import classify_by_head
from clip_jax.evaluation.linear_probe import linear_probe
from clip_jax.evaluation.zero_shot import zero_shot
from clip_jax.interpolate import interpolate
from clip_jax.judged_run import start_of_head
from clip_jax.models import CLIP
from clip_jax.options import from_dict, to_dict
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.platform import keep_compiled_programs, keep_libtpu_quiet
from clip_jax.training import config as config_module
from clip_jax.training.config import RunConfig
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.resolve import with_classes
from clip_jax.training.run import run

BEFORE = ("zero-shot", "linear probe")
SEEDS, GRID_SEED = (0, 1, 2), 0
RATES = (6e-5, 2e-4, 6e-4, 2e-3)  # peaks; that of pre-training is 2e-3
PRETRAINING = {"batch_size": 64, "total_steps": 600}
STEPS = 100
ALPHA = 0.5  # of WiSE-FT

Accuracies = dict[str, float]


@dataclass(frozen=True)
class Method:
    """A way to adapt a model by training it.

    Attributes:
      rate: the peak of the learning rate; from the grid, or as docs/fine-tuning.md says.
      changes: what it changes in the configuration of a run.
      optimizer: what it changes in the optimizer's.
      plain: whether the optimizer is the tutorials'.
    """

    rate: float
    changes: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False


IGNORED = {"repeated_captions": "ignored"}
METHODS = {
    "plain": Method(2e-4, plain=True),
    "plain, five times ours": Method(1e-3, plain=True),
    "full, negatives": Method(2e-4),
    "full, ignored": Method(2e-4, IGNORED),
    "full, ignored, layer decay": Method(6e-4, IGNORED, {"layer_decay": 0.65}),
    "image tower locked": Method(6e-4, IGNORED, {"frozen": ("visual/*",)}),
    "text tower locked": Method(2e-4, IGNORED, {"frozen": ("text/*",)}),
    "adapters": Method(6e-4, {**IGNORED, "adapters": {"rank": 8}}),
    "head": Method(2e-4, {"loss": "cross_entropy"}),
    "head after linear probe": Method(2e-4, {"loss": "cross_entropy", "head_from": "linear_probe"}),
}
GRID = (
    "full, ignored",
    "full, ignored, layer decay",
    "image tower locked",
    "adapters",
)  # the others have the rate of the first


def main() -> None:
    """Do what is missing, then write the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME")
    parser.add_argument("--grid", action="store_true", help=f"try the rates {RATES} on seed {GRID_SEED} instead")
    parser.add_argument("--folder", type=Path, default=Path("runs/adaptation"))
    flags = parser.parse_args()
    keep_libtpu_quiet()
    keep_compiled_programs()
    bench = Bench(flags.folder)
    chosen = [(name, METHODS[name]) for name in flags.methods or (GRID if flags.grid else METHODS)]
    for seed in (GRID_SEED,) if flags.grid else flags.seeds:
        bench.before(seed)
        for name, method in at_all_rates(chosen) if flags.grid else chosen:
            bench.adapted(with_rate(name, method), method, seed)
    kept = functools.partial(kept_of, flags.folder / "results")
    write(
        {name: kept(name, SEEDS) for name in BEFORE}
        | {name: kept(with_rate(name, method), SEEDS) for name, method in METHODS.items()},
        {
            with_rate(*each): kept(with_rate(*each), (GRID_SEED,))
            for each in at_all_rates((name, METHODS[name]) for name in GRID)
        },
    )


def at_all_rates(methods: Iterable[tuple[str, Method]]) -> list[tuple[str, Method]]:
    """The methods of the grid, with their names."""
    return [(name, replace(method, rate=rate)) for name, method in methods for rate in RATES]


def with_rate(name: str, method: Method) -> str:
    """A method's name, and its rate."""
    return f"{name}, rate {method.rate:g}"


class Bench:
    """Models, how they are judged, and where it is kept."""

    def __init__(self, folder: Path):
        self._folder = folder
        # Without what the demo adds against overfitting: the methods are compared as they are.
        self._demo = load_config("demo", {"augment.crop": "random", "optimizer.weight_decay": "0.1"})
        self._encoders = make_encoders(CLIP(self._demo.model), make_partitioner(MeshConfig()))
        with_head = replace(self._demo.model, classes=tuple(sorted(data.NEW_NAMES)))  # in the order of folders
        self._with_head = replace(self._encoders, model=CLIP(with_head))
        self._shapes = data.shapes()

    def before(self, seed: int) -> None:
        """Judge the pre-trained model, and a linear probe of it."""
        self._kept("zero-shot", seed, lambda: {"": self._judged(self._pretrained(seed), seed)})
        self._kept("linear probe", seed, lambda: {"": self._probed(seed)})

    def adapted(self, name: str, method: Method, seed: int) -> None:
        """Judge what a method makes of the pre-trained model: after the last step, averaged, and interpolated."""
        self._kept(name, seed, lambda: self._adapted(method, seed))

    def _kept(self, name: str, seed: int, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure, unless there is a result."""
        file = self._folder / "results" / f"{name}-{seed}.json"
        if not file.exists():
            results = measure()
            print(f"{name}, seed {seed}: {results}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results))

    def _adapted(self, method: Method, seed: int) -> dict[str, Any]:
        optimizer = (
            mock.patch.object(config_module, "make_optimizer", tutorials_adam) if method.plain else nullcontext()
        )
        head = {}

        def start_head(*run_parts: Any) -> Callable[[Variables], Any]:
            start = start_of_head(*run_parts)
            return lambda variables: head.setdefault("classifier", start(variables))

        with tempfile.TemporaryDirectory() as workdir, optimizer:
            began = time.process_time()
            state = run(with_classes(self._recipe(method, seed)), workdir, make_start_head=start_head)
            seconds = time.process_time() - began
        before = {"params": {**self._pretrained(seed)["params"], **head}}
        variants = {
            "": state.variables,
            "WiSE-FT": interpolate(before, state.variables, ALPHA),
            "EMA": state.ema_variables,
        }
        return {"seconds": seconds} | {name: self._judged(weights, seed) for name, weights in variants.items()}

    def _judged(self, variables: Variables, seed: int) -> Accuracies:
        """By the texts; by the head, if there is one, what it has the classes of."""
        towers = {"params": {name: part for name, part in variables["params"].items() if name != "classifier"}}
        digits = zero_shot(self._encoders, towers, data.all_digits(seed), progress=False)
        shapes = zero_shot(self._encoders, towers, self._shapes, progress=False)
        accuracies = {**data.accuracies(digits.scores, digits.labels), "shapes": shapes.metrics["acc1"]}
        if towers["params"].keys() == variables["params"].keys():
            return accuracies
        result = classify_by_head(self._with_head, variables, data.new_digits(seed), progress=False)
        return {"new": result.metrics["acc1"], "old": accuracies["old"], "shapes": accuracies["shapes"]}

    def _probed(self, seed: int) -> Accuracies:
        """As the pre-trained model, whose towers stay, but for the new digits."""
        before = self._judged(self._pretrained(seed), seed)
        probe = linear_probe(self._encoders, self._pretrained(seed), data.new_digits(seed), progress=False)
        return {"new": probe.metrics["lp_acc1"], "old": before["old"], "shapes": before["shapes"]}

    @functools.cache  # noqa: B019  (there is one bench)
    def _pretrained(self, seed: int) -> Variables:
        """The model of a seed, trained unless it is there."""
        digits = self._written(data.old_digits(), "old")
        config = replace(
            self._demo,
            name="adaptation",
            data={"shapes": {"weight": 3.0}, "digits": {**digits, "weight": 1.0}},
            eval_datasets=(),
            seed=seed,
            checkpoint_every=PRETRAINING["total_steps"],
            **PRETRAINING,
        )
        return run(config, str(self._folder / f"pretrained-{seed}")).variables

    def _recipe(self, method: Method, seed: int) -> RunConfig:
        """The run that a method is: the recipe of fine-tuning, with the method's changes."""
        optimizer = {"learning_rate": method.rate, "weight_decay": 0.1, "warmup_steps": STEPS // 10}
        recipe = {
            "data": {"digits": self._written(data.new_digits(seed).train(), f"new-{seed}")},
            "eval_datasets": (),
            "init_from": str(self._folder / f"pretrained-{seed}"),
            "seed": seed,
            "batch_size": 32,
            "total_steps": STEPS,
            "checkpoint_every": STEPS,
            "optimizer": {**optimizer, **method.optimizer},
            "unroll": 1,  # which compiles sooner
            "ema_decay": 0.95,  # over a fifth of the run or so, as FT-CLIP's 0.9998 is
        }
        return from_dict(RunConfig, to_dict(self._demo) | recipe | method.changes, "the recipe")

    def _written(self, pictures: data.Pictures, name: str) -> dict[str, Any]:
        """Pictures as a source that a configuration names."""
        folder = self._folder / "digits" / name
        pictures.write(folder)
        return {"kind": "folder", "path": str(folder), "templates": data.TEMPLATES}


def tutorials_adam(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of openai/CLIP issue 83, in place of `make_optimizer`.

    `torch.optim.Adam(params, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)`, where the decay is added to the
    gradient, of every parameter; the rate stays as it is.
    """
    adam = optax.scale_by_adam(0.9, 0.98, 1e-6)
    return optax.chain(optax.add_decayed_weights(0.2), adam, optax.scale(-config.learning_rate))


if __name__ == "__main__":
    main()
