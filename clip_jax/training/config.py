"""A run's configuration as frozen, checked values, read once from the ml_collections file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from clip_jax.errors import UserError
from clip_jax.losses import LOSSES
from clip_jax.models import CLIP, CLIPConfig, Execution
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import Training

# What may differ between a run and its continuation: none of it changes what is learned.
FREE_TO_CHANGE = (
    "mesh",
    "remat",
    "unroll",
    "attention",
    "loss_tile",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "data_dir",
    "eval_datasets",
)


@dataclass(frozen=True)
class RunConfig:
    """One training run. Fields are those of the files in configs/, grouped by who uses them."""

    name: str
    model: CLIPConfig
    execution: Execution
    optimizer: OptimizerConfig
    loss: str
    loss_tile: int
    microbatches: int
    mesh: MeshConfig
    seed: int
    batch_size: int
    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    data: Mapping[str, Mapping[str, Any]]
    data_dir: str | None
    eval_datasets: tuple[str, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RunConfig":
        """From the plain values of a config file (`ConfigDict.to_dict()`).

        Raises:
          UserError: a value is impossible.
        """
        if config["loss"] not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}; got {config['loss']!r}")
        steps = ("total_steps", "log_every", "eval_every", "checkpoint_every")
        for field in ("loss_tile", "microbatches", "batch_size", *steps):
            if config[field] < 1:
                raise UserError(f"{field} must be at least 1, got {config[field]}")
        return cls(
            name=config["name"],
            model=CLIPConfig.from_dict(config["model"]),
            execution=Execution(**{k: config[k] for k in ("dtype", "remat", "unroll", "attention", "block_tokens")}),
            optimizer=OptimizerConfig(**config["optimizer"]),
            mesh=MeshConfig(**config["mesh"]),
            **{
                k: config[k]
                for k in (
                    "loss",
                    "loss_tile",
                    "microbatches",
                    "seed",
                    "batch_size",
                    "total_steps",
                    "log_every",
                    "eval_every",
                    "checkpoint_every",
                    "data",
                    "data_dir",
                )
            },
            eval_datasets=tuple(config["eval_datasets"]),
        )


def make_training(config: RunConfig, devices: list[jax.Device] | None = None) -> Training:
    """What a run trains, over `devices` (default: all, of every process).

    Raises:
      UserError: the mesh does not fit the devices, or the schedule not the run.
    """
    return Training(
        model=CLIP(config.model, config.execution),
        optimizer=make_optimizer(config.optimizer, config.total_steps),
        partitioner=make_partitioner(config.mesh, devices),
        loss=LOSSES[config.loss],
        loss_tile=config.loss_tile,
        microbatches=config.microbatches,
    )


def check_same_run(config: Mapping[str, Any], previous: Mapping[str, Any]) -> None:
    """A workdir continues only the run it holds.

    Args:
      config: the plain values of this run.
      previous: those that the workdir's config.json holds.

    Raises:
      UserError: they differ in something that changes what is learned; the message names it.
    """
    ours, theirs = _flatten(config), _flatten(previous)
    for key in sorted(set(ours) | set(theirs)):
        if key.split(".")[0] not in FREE_TO_CHANGE and ours.get(key) != theirs.get(key):
            raise UserError(
                f"the workdir holds a run with {key}={theirs.get(key)!r}, this one has {ours.get(key)!r}; "
                "give another --workdir, or the same config"
            )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
