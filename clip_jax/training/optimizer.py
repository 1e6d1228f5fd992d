"""AdamW with the paper's settings: decoupled weight decay, linear warm-up, cosine decay (section 2.5, table 18).

Fine-tuning has its own rate and decay for parts of the model, and clips gradients or updates; all of it composes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import UserError
from clip_jax.options import option
from clip_jax.training.parameters import check_patterns, is_box, layer_factors, path_of, paths_of, product_of_matching

# Leaves that are gains or biases by name, wherever they stand; `logit_scale` is a gain on the logits.
NOT_DECAYED = ("bias", "scale", "logit_scale", "logit_bias")

MOMENT_TYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW; the defaults are the paper's for ViT-B (tables 18 and 20)."""

    learning_rate: float = option(5e-4, "the peak, reached after the warm-up")
    weight_decay: float = option(
        0.2, "decoupled, times the learning rate as in torch.optim.AdamW; not on gains, biases"
    )
    b1: float = option(0.9, "decay of the first moment")
    b2: float = option(0.98, "decay of the second moment; the paper has 0.999 for ResNets")
    eps: float = option(1e-6, "added to the root of the second moment; the paper has 1e-8 for ResNets")
    warmup_steps: int | float = option(2000, "steps of linear warm-up; below 1 a share of the run, as 0.1")
    mu_dtype: str = option("float32", "type of the first moment; bfloat16 saves 2 bytes per parameter")
    frozen: tuple[str, ...] = option((), "patterns of parameters that are not trained, such as visual/*")
    learning_rates: Mapping[str, float] = option({}, "pattern of parameters -> factor on their learning rate")
    weight_decays: Mapping[str, float] = option({}, "pattern of parameters -> factor on their weight decay")
    layer_decay: float = option(
        1.0, "factor on the learning rate from one block of a tower to the one below; 0.6 to 0.75 for fine-tuning"
    )
    clip_norm: float = option(0.0, "longest gradient of all parameters together; longer ones are shortened; 0: any")
    clip_updates: bool = option(
        False, "StableAdamW: a tensor's rate falls where its gradients outgrow the second moment (arXiv 2304.13013)"
    )

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be above 0, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        for pattern, factor in self.learning_rates.items():
            if not 0 < factor < math.inf:
                raise UserError(
                    f"optimizer.learning_rates has factors above 0, got {factor} for {pattern!r}; parameters that "
                    "are not to be trained go into optimizer.frozen"
                )
        for pattern, factor in self.weight_decays.items():
            if not 0 <= factor < math.inf:
                raise UserError(f"optimizer.weight_decays has factors of at least 0, got {factor} for {pattern!r}")
        if self.mu_dtype not in MOMENT_TYPES:
            raise UserError(f"optimizer.mu_dtype must be one of {', '.join(MOMENT_TYPES)}; got {self.mu_dtype!r}")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Step number (from 0) -> learning rate: (step + 1) / warmup_steps of the peak, then a cosine down to 0.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    share = 0 < config.warmup_steps < 1
    warmup_steps = round(config.warmup_steps * total_steps) if share else config.warmup_steps
    if not 0 <= warmup_steps < total_steps or warmup_steps != int(warmup_steps):
        raise UserError(
            f"optimizer.warmup_steps must be at least 0 and less than total_steps, or a share below 1; got "
            f"{config.warmup_steps} and {total_steps}"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=int(warmup_steps),
        decay_steps=total_steps,
    )
    return lambda step: schedule(step + 1.0)  # optax would compute with an integer in float32, under x64 as well


def weight_decay_mask(params: Any) -> Any:
    """True for every leaf that decays: all weights that are not gains or biases, embeddings included."""

    def decays(path: tuple, _: Any) -> bool:
        return path[-1].key not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_box)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optax transformation of the parameters that are trained; its state holds the moments and the step count.

    Its `init` raises UserError where a pattern matches none of them.
    """
    mu_dtype = None if config.mu_dtype == "float32" else config.mu_dtype  # None: as parameters, float64 in proofs
    steps = [
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=mu_dtype),
        optax.masked(_add_decayed_weights(config), weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    ]
    if config.learning_rates or config.layer_decay != 1:
        steps.insert(-1, _scale_by_factors(config))
    optimizer = optax.chain(*steps)
    if config.clip_updates:
        optimizer = _clip_updates(optimizer, config)
    return optax.chain(_clip_gradients(config.clip_norm), optimizer) if config.clip_norm else optimizer


def _add_decayed_weights(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` with a factor for each path."""

    def decayed(keys: tuple, update: Any, param: Any) -> Any:
        return update + config.weight_decay * product_of_matching(path_of(keys), config.weight_decays) * param

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    return optax.GradientTransformation(
        _checked(config.weight_decays, "optimizer.weight_decays", "parameter that is trained and decays"), update
    )


def _scale_by_factors(config: OptimizerConfig) -> optax.GradientTransformation:
    """Multiply each parameter's update by the factors on its learning rate."""

    def scaled(keys: tuple, update: Any, of_layer: Any) -> Any:
        factor = of_layer * product_of_matching(path_of(keys), config.learning_rates)
        return update * jnp.asarray(factor, update.dtype)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        of_layers = layer_factors(updates, config.layer_decay)
        return jax.tree_util.tree_map_with_path(scaled, updates, of_layers), state

    return optax.GradientTransformation(
        _checked(config.learning_rates, "optimizer.learning_rates", "parameter that is trained"), update
    )


def _checked(patterns: Mapping[str, float], option: str, which: str) -> Callable[[Any], optax.EmptyState]:
    """The init of a transformation without a state, for which each pattern must match a parameter."""

    def init(params: Any) -> optax.EmptyState:
        check_patterns(patterns, paths_of(params), option, which)
        return optax.EmptyState()

    return init


def _clip_gradients(longest: float) -> optax.GradientTransformation:
    """`torch.nn.utils.clip_grad_norm_`, whose 1e-6 in the denominator `optax.clip_by_global_norm` lacks."""

    def clip(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, longest / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(clip)


def _clip_updates(adam: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
    """StableAdamW (arXiv 2304.13013, algorithm 2) from AdamW.

    A tensor's update, decay included, is divided by max(1, RMS), where RMS^2 is the mean of g^2 / max(v, eps^2) over
    its entries: Adafactor's clipping, moved to the learning rate. The blocks of a stack are tensors of their own.
    """

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)
        moments = state[0]
        second = optax.tree.bias_correction(moments.nu, config.b2, moments.count)

        def clip(keys: tuple, update: Any, grad: Any, second: Any) -> Any:
            axes = tuple(range(1 if "resblocks" in path_of(keys) else 0, grad.ndim))
            ratio = jnp.square(grad) / jnp.maximum(second, config.eps**2)
            return update / jnp.maximum(1.0, jnp.sqrt(ratio.mean(axes, keepdims=True)))

        return jax.tree_util.tree_map_with_path(clip, updates, grads, second), state

    return optax.GradientTransformation(adam.init, update)
