"""What a training run carries from step to step, born sharded."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from clip_jax.losses import SOFTMAX, Loss
from clip_jax.models import CLIP, abstract_inputs
from clip_jax.parallel import Partitioner
from clip_jax.training.adapters import AdapterConfig, initial_adapters
from clip_jax.training.guard import GuardConfig, initial_guard
from clip_jax.training.parameters import merge, split


@dataclass(frozen=True)
class Training:
    """What is trained and how: all that a train step and its state are made of.

    Attributes:
      model: with its way of execution.
      optimizer: from `make_optimizer`.
      partitioner: the mesh and what is split over it.
      loss: one of `LOSSES`, with its options.
      frozen: patterns of the paths of parameters that are not trained, those that the loss does not depend on among
        them; with adapters, all but the adapted kernels.
      adapters: through which kernels are trained, if its rank is above 0.
      running_statistics: whether BatchNorm normalises by its running statistics, which then stay as they are.
      patch_dropout: share of the patches of each image that a ViT does not see.
      seed: of what is random in a step.
      ema_decay: of the moving average of the trained parameters; 0 keeps none.
      microbatches: pieces in which each device encodes its share of the batch. The loss is still one over the
        global batch, so the gradients do not depend on it (but BatchNorm's statistics do: see `encode`).
      guard: which steps are skipped.
    """

    model: CLIP
    optimizer: optax.GradientTransformation
    partitioner: Partitioner
    loss: Loss = SOFTMAX
    microbatches: int = 1
    guard: GuardConfig = GuardConfig()
    frozen: tuple[str, ...] = ()
    adapters: AdapterConfig = AdapterConfig()
    running_statistics: bool = False
    patch_dropout: float = 0.0
    seed: int = 0
    ema_decay: float = 0.0


@flax.struct.dataclass
class TrainState:
    """Plain arrays (or their shapes, shardings or specs), sharded by the rules of clip_jax/parallel.py.

    Attributes:
      step: int32 scalar, how many batches have been seen; the updates are fewer by those that were skipped.
      params: the model's parameters, float32; adapters are merged into them.
      batch_stats: running statistics of BatchNorm; empty for a ViT.
      opt_state: the optimizer's moments of what is trained, parameters or adapters' factors, and its count of updates.
      guard: what the next step is judged by, and how many were skipped.
      ema: the moving average of the parameters that are trained; empty if none is kept.
      adapters: the `Adapters` of the kernels that have them; empty if none has.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    guard: Any
    ema: Any = flax.struct.field(default_factory=dict)
    adapters: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, **({"batch_stats": self.batch_stats} if self.batch_stats else {})}

    @property
    def ema_variables(self) -> dict[str, Any]:
        """What `model.apply` takes to run with the averaged parameters."""
        return {**self.variables, "params": merge(self.params, self.ema)}


def initial_state(training: Training, seed: int) -> TrainState:
    """A fresh state, every leaf created where it will live: no host or device ever holds it unsharded.

    Raises:
      UserError: the model lacks a parameter of the loss.
    """
    init = _boxed_init(training)
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=state_shardings(training))(jax.random.key(seed))


def abstract_state(training: Training) -> TrainState:
    """Shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct` leaves), with no array made."""
    return _abstract(jax.eval_shape(_boxed_init(training), jax.random.key(0)), training.partitioner)


def abstract_variables(model: CLIP, partitioner: Partitioner) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the model's variables alone, for whoever only evaluates."""
    return _abstract(jax.eval_shape(model.init, jax.random.key(0), *abstract_inputs(model.config)), partitioner)


def state_shardings(training: Training) -> TrainState:
    """A NamedSharding for every leaf: parameters, moments and batch statistics follow the same rules."""
    return training.partitioner.shardings(jax.eval_shape(_boxed_init(training), jax.random.key(0)))


def _abstract(boxed: Any, partitioner: Partitioner) -> Any:
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        nn.unbox(boxed),
        partitioner.shardings(boxed),
    )


def _boxed_init(training: Training):
    """key -> TrainState whose parameters and moments still carry their logical axis names."""

    def init(key: jax.Array) -> TrainState:
        variables = training.model.lazy_init(key, *abstract_inputs(training.model.config))
        params = training.loss.start(variables["params"])
        trained, _ = split(params, training.frozen)
        adapters = initial_adapters(training.adapters, trained, key) if training.adapters.rank else {}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=training.optimizer.init(adapters.factors if adapters else trained),
            guard=initial_guard(training.guard),
            ema=trained if training.ema_decay else {},
            adapters=adapters,
        )

    return init
