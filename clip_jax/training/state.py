"""What a training run carries from step to step, born sharded."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.models import CLIP, abstract_inputs
from clip_jax.parallel import tree_shardings


@flax.struct.dataclass
class TrainState:
    """Plain arrays (or their shapes, shardings or specs), sharded by the rules of clip_jax/parallel.py.

    Attributes:
      step: int32 scalar, how many updates have been made.
      params: the model's parameters, float32.
      batch_stats: running statistics of BatchNorm; empty for a ViT.
      opt_state: the optimizer's moments.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, **({"batch_stats": self.batch_stats} if self.batch_stats else {})}


def initial_state(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    rules: Mapping[str, Any] | None = None,
) -> TrainState:
    """A fresh state, every leaf created where it will live: no host or device ever holds it unsharded."""
    init = _boxed_init(model, optimizer)
    shardings = state_shardings(model, optimizer, mesh, rules)
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(jax.random.key(seed))


def abstract_state(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, Any] | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct` leaves), with no array made."""
    shapes = nn.unbox(jax.eval_shape(_boxed_init(model, optimizer), jax.random.key(0)))
    shardings = state_shardings(model, optimizer, mesh, rules)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def abstract_variables(model: CLIP, mesh: Mesh, rules: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the model's variables alone, for whoever only evaluates."""
    return abstract_state(model, optax.identity(), mesh, rules).variables


def state_shardings(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, Any] | None = None,
) -> TrainState:
    """A NamedSharding for every leaf: parameters, moments and batch statistics follow the same rules."""
    return tree_shardings(jax.eval_shape(_boxed_init(model, optimizer), jax.random.key(0)), mesh, rules)


def _boxed_init(model: CLIP, optimizer: optax.GradientTransformation):
    """key -> TrainState whose parameters and moments still carry their logical axis names."""

    def init(key: jax.Array) -> TrainState:
        variables = model.lazy_init(key, *abstract_inputs(model.config))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
        )

    return init
