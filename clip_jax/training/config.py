"""A run's configuration as frozen, checked values: the one list of what a config file can say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from clip_jax.data.access import Access
from clip_jax.data.pipeline import InputConfig
from clip_jax.data.sources import source_config
from clip_jax.errors import UserError
from clip_jax.losses import LOSSES, REPEATED_CAPTIONS, Contrastive, CrossEntropy, Loss
from clip_jax.models import CLIP, CLIPConfig, Execution, VisionTransformerConfig, variable_shapes
from clip_jax.options import inline, kept_values, option
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing import Augment
from clip_jax.training.adapters import AdapterConfig, adapted_paths
from clip_jax.training.guard import GuardConfig
from clip_jax.training.initial_weights import InitialWeights
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.parameters import check_patterns, paths_of, split
from clip_jax.training.state import Training


@dataclass(frozen=True)
class RunConfig:
    """One training run, as the files in configs/ describe it; the defaults are the paper's recipe."""

    name: str = option(help="of the model in reports and plans; evaluation takes official weights of this name")
    model: CLIPConfig = option(
        help="the architecture: its fields, or an official name such as ViT-B/32; left out, that of init_from"
    )
    data: Mapping[str, Mapping[str, Any]] = option({}, "sources to train on by name, each with its fields and a weight")
    init: InitialWeights = inline(InitialWeights())
    input: InputConfig = inline(InputConfig())
    access: Access = inline(Access())
    augment: Augment = option(Augment(), "how training varies its images")
    eval_datasets: tuple[str, ...] = option((), "what evaluation measures", may_change=True)
    seed: int = option(0, "of the first weights and of the order of the data")
    batch_size: int = option(32_768, "examples in a step, over all devices")
    total_steps: int = option(390_625, "of the whole run; by default 32 epochs of 400 million pairs")
    epochs: float = option(0.0, "passes over the data, from which total_steps follow; 0 for total_steps", True)
    microbatches: int = option(1, "pieces in which each device encodes its share; raise it when memory is short")
    loss: str = option(
        "softmax",
        f"{' or '.join(LOSSES)}; sigmoid goes with model.logit_bias, cross_entropy trains a classification head",
    )
    loss_tile: int = option(1024, "rows of the similarity matrix in memory at a time, at most", may_change=True)
    repeated_captions: str = option(
        "negatives",
        "what images with the same caption are to each other within a batch: negatives, positives (targets are spread "
        "evenly over them) or ignored (left out)",
    )
    label_smoothing: float = option(0.0, "share of a target that cross_entropy spreads over all classes")
    execution: Execution = inline(Execution())
    optimizer: OptimizerConfig = option(OptimizerConfig(), "AdamW")
    adapters: AdapterConfig = option(AdapterConfig(), "low-rank adapters (LoRA); with them nothing else is trained")
    guard: GuardConfig = option(GuardConfig(), "which steps are skipped, and when the run stops for them")
    running_statistics: bool = option(
        False, "whether BatchNorm normalises by its running statistics, which then stay; always in a frozen tower"
    )
    cache_features: bool = option(
        False, "whether the features of a frozen image tower are computed only once; needs augment.crop=center"
    )
    patch_dropout: float = option(0.0, "share of an image's patches that training leaves out at random; 0.5 in FLIP")
    ema_decay: float = option(0.0, "of a moving average of the weights, kept beside them; 0 keeps none")
    mesh: MeshConfig = option(MeshConfig(), "devices of a slice along each axis", may_change=True)
    log_every: int = option(100, "steps between lines of metrics", may_change=True)
    eval_every: int = option(10_000, "steps between evaluations; 0 for an epoch", may_change=True)
    patience: int = option(
        0,
        "end the run after so many evaluations in a row that do not beat the best one before them; 0: never",
        True,
    )
    checkpoint_every: int = option(5_000, "steps between checkpoints; 0 for an epoch", may_change=True)
    stall_seconds: float = option(
        600.0, "without a step at which an alarm says what each thread is doing; ten times that for anything else", True
    )
    keep_checkpoints: int = option(3, "how many of the newest to keep, beside the best", may_change=True)
    keep_every: int = option(0, "keep a checkpoint every so many steps for good; 0 keeps none", may_change=True)

    def __post_init__(self):
        self._check_ranges()
        self._check_loss()
        self._check_adapters()
        if self.patch_dropout and not isinstance(self.model.vision, VisionTransformerConfig):
            raise UserError("patch_dropout leaves out patches of a ViT; a ResNet has none, so set it to 0")
        if self.cache_features:
            self._check_images_repeat()

    def _check_ranges(self) -> None:
        """See that each number is one that its field can have."""
        for name in ("ema_decay", "patch_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if self.batch_size < 2:
            raise UserError(f"batch_size must be at least 2, for pairs to be told apart; got {self.batch_size}")
        for name in ("microbatches", "loss_tile", "keep_checkpoints", "total_steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("keep_every", "eval_every", "checkpoint_every", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.epochs < math.inf:
            raise UserError(f"epochs must be at least 0, got {self.epochs}")
        if not self.stall_seconds > 0:
            raise UserError(f"stall_seconds must be above 0, got {self.stall_seconds}")

    def _check_loss(self) -> None:
        """See that there is such a loss, and that what goes with another one is not set."""
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
        if self.repeated_captions not in REPEATED_CAPTIONS:
            choices = ", ".join(REPEATED_CAPTIONS)
            raise UserError(f"repeated_captions must be one of {choices}; got {self.repeated_captions!r}")
        if self.label_smoothing and self.loss != "cross_entropy":
            raise UserError(f"label_smoothing is an option of the loss cross_entropy; set it to 0 with {self.loss}")
        if self.model.classes and self.loss != "cross_entropy":
            raise UserError(
                f"model.classes makes a head, which the loss {self.loss} does not train; set loss to cross_entropy, or "
                "leave the classes out"
            )

    def _check_adapters(self) -> None:
        """See that there is something to adapt, and that nothing else says what is trained."""
        if self.adapters.rank and not self.init.init_from:
            raise UserError("adapters change a model that has been trained; say which with init_from")
        if self.adapters.rank and self.optimizer.frozen:
            raise UserError(
                "adapters freeze all parameters by themselves; leave optimizer.frozen empty, and choose with "
                "adapters.kernels what is adapted"
            )

    def _check_images_repeat(self) -> None:
        """See that an image is the same in every epoch, as it must be for features that are computed once."""
        if self.augment.is_random:
            raise UserError(
                "cache_features wants images that are the same in every epoch: set augment.crop=center, and neither "
                "augment.flip nor augment.color_jitter"
            )
        if self.patch_dropout:
            raise UserError("cache_features wants images that are the same in every epoch; set patch_dropout to 0")
        if self.input.on_damage != "stop":
            raise UserError("cache_features reads every image, and cannot skip one; set on_damage to stop")


def make_training(config: RunConfig, devices: list[jax.Device] | None = None) -> Training:
    """What a run trains, over `devices` (default: all, of every process).

    Raises:
      UserError: the mesh does not fit the devices, or the schedule not the run; or what is frozen is nothing, or all.
    """
    params = variable_shapes(config.model)["params"]
    check_patterns(config.optimizer.frozen, paths_of(params), "optimizer.frozen", "parameter of the model")
    frozen = frozen_patterns(config)
    trained, _ = split(params, frozen)
    if config.cache_features and "visual" in trained:
        raise UserError(
            "cache_features computes the features of images once, but the image tower is trained; freeze all of it "
            "(optimizer.frozen=visual/*), or leave cache_features out"
        )
    if not trained:
        raise UserError("optimizer.frozen leaves nothing to train; name less than all parameters")
    return Training(
        model=CLIP(config.model, config.execution),
        optimizer=make_optimizer(config.optimizer, config.total_steps),
        partitioner=make_partitioner(config.mesh, devices),
        loss=_loss(config),
        microbatches=config.microbatches,
        guard=config.guard,
        frozen=frozen,
        adapters=config.adapters,
        running_statistics=config.running_statistics or config.adapters.rank > 0 or "visual" not in trained,
        patch_dropout=config.patch_dropout,
        seed=config.seed,
        ema_decay=config.ema_decay,
    )


def frozen_patterns(config: RunConfig) -> tuple[str, ...]:
    """Of the paths of all parameters that a run does not train: by its wish, or because its loss does not see them.

    With adapters these are all but the adapted kernels.

    Raises:
      UserError: the adapters do not fit what could be trained.
    """
    untrained = (*config.optimizer.frozen, *LOSSES[config.loss].untrained)
    if not config.adapters.rank:
        return untrained
    params = variable_shapes(config.model)["params"]
    adapted = adapted_paths(config.adapters, split(params, untrained)[0])
    return tuple(path for path in paths_of(params) if path not in adapted)


def _loss(config: RunConfig) -> Loss:
    """The loss that a configuration names, with its options."""
    match LOSSES[config.loss]:
        case Contrastive() as loss:
            return replace(loss, tile=config.loss_tile, repeated_captions=config.repeated_captions)
        case CrossEntropy() as loss:
            return replace(loss, label_smoothing=config.label_smoothing)
        case loss:
            return loss


def check_same_run(config: RunConfig, previous: RunConfig) -> None:
    """A workdir continues only the run it holds, or one with more steps that is the same otherwise.

    Args:
      config: this run.
      previous: what the workdir's config.json holds.

    Raises:
      UserError: they differ in something that changes what is learned; the message names it.
    """
    ours, theirs = _kept(config), _kept(previous)
    if config.total_steps > previous.total_steps:
        theirs["total_steps"] = config.total_steps
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"the workdir holds a run with {name}={theirs.get(name)!r:.200}, this one has {ours.get(name)!r:.200}; "
                "give another --workdir, or the same config"
            )


def _kept(config: RunConfig) -> dict[str, Any]:
    """What a run must go on with; of its data the sources with all their fields."""
    values = {name: value for name, value in kept_values(config).items() if name.partition(".")[0] != "data"}
    sources = {name: source_config(name, fields) for name, fields in config.data.items()}
    for name, source in sources.items():
        values |= {f"data.{name}.kind": type(source).__name__, **kept_values(source, f"data.{name}.")}
    return values
