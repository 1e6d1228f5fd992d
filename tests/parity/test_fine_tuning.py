"""50 steps of fine-tuning against PyTorch's: parameter groups, frozen parts, `clip_grad_norm_` and a plain EMA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from clip_jax.models import CLIP, Execution
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing.images import Preprocess
from clip_jax.training.guard import initial_guard
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.parameters import split
from clip_jax.training.state import Training, TrainState
from clip_jax.training.step import make_train_step
from tests.reference_models import ODD_VIT, variables_of
from tests.reference_training import STEPS, batches, check, learning_rate, reference_loss, reference_model

EMA_DECAY = 0.9
FROZEN = ("visual/conv1/*", "text/token_embedding", "logit_scale")
SETTINGS = OptimizerConfig(
    learning_rate=5e-4,
    warmup_steps=10,
    frozen=FROZEN,
    layer_decay=0.65,
    learning_rates={"text/*": 0.5, "*/ln_*": 2.0},
    weight_decays={"visual/*": 0.25, "*projection": 0.0},
    clip_norm=8.0,
)


@pytest.fixture(scope="module")
def reference():
    """(losses, gradients of the first step, variables, averaged variables) in float64."""
    model = reference_model(ODD_VIT)
    averages = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    adamw, losses, norms = reference_adamw(model), [], []
    preprocess = Preprocess.from_config(ODD_VIT)
    for step, (images, tokens) in enumerate(batches(ODD_VIT), start=1):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(SETTINGS, step) * group["factor"]
        adamw.zero_grad()
        loss = reference_loss(model, preprocess.normalize(images, np.float64), tokens)
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms.append(torch.nn.utils.clip_grad_norm_(trained, SETTINGS.clip_norm).item())
        adamw.step()
        losses.append(loss.item())
        for name, tensor in model.state_dict().items():
            averages[name].mul_(EMA_DECAY).add_(tensor, alpha=1 - EMA_DECAY)
    assert min(norms) < SETTINGS.clip_norm < max(norms)
    return losses, variables_of(model.state_dict(), ODD_VIT), variables_of(averages, ODD_VIT)


def reference_adamw(model):
    """A group per parameter, chosen by OpenAI's names."""
    groups = []
    for name, parameter in model.named_parameters():
        if name in ("visual.conv1.weight", "token_embedding.weight", "logit_scale"):
            parameter.requires_grad_(False)
            continue
        image, norm = name.startswith("visual."), "ln_" in name
        tower = ODD_VIT.vision if image else ODD_VIT.text
        block = re.search(r"resblocks\.(\d+)\.", name)
        if block:
            below = tower.layers - int(block[1])
        elif re.search("embedding|conv1|ln_pre", name):
            below = tower.layers + 1
        else:
            below = 0
        spared = name.endswith("bias") or norm
        decay = 0.0 if spared or name == "text_projection" else SETTINGS.weight_decay * (0.25 if image else 1.0)
        factor = 0.65**below * (1.0 if image else 0.5) * (2.0 if norm else 1.0)
        groups.append({"params": [parameter], "weight_decay": decay, "factor": factor})
    return torch.optim.AdamW(groups, betas=(SETTINGS.b1, SETTINGS.b2), eps=SETTINGS.eps)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_fifty_steps_follow(reference, dtype, tolerance):
    losses, variables, averages = reference
    with jax.enable_x64(dtype == "float64"):
        ours, first, last = our_run(dtype)
    np.testing.assert_allclose(ours, losses, rtol=tolerance)
    check(jax.tree.map(np.asarray, last.variables), variables, tolerance)
    check(jax.tree.map(np.asarray, last.ema_variables), averages, tolerance)
    trained, frozen = split(last.params, FROZEN)
    assert set(flatten_dict(frozen, sep="/")) == {"visual/conv1/kernel", "text/token_embedding", "logit_scale"}
    for path, leaf in flatten_dict(frozen, sep="/").items():
        assert np.array_equal(leaf, flatten_dict(first, sep="/")[path]), path
    moments = last.opt_state[1][0]
    for kept in (moments.mu, moments.nu, last.ema):
        assert jax.tree.structure(kept) == jax.tree.structure(trained)


def our_run(dtype):
    partitioner = make_partitioner(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = make_optimizer(SETTINGS, STEPS)
    training = Training(
        CLIP(ODD_VIT, Execution(dtype=dtype)), optimizer, partitioner, frozen=FROZEN, ema_decay=EMA_DECAY
    )
    variables = variables_of(reference_model(ODD_VIT).state_dict(), ODD_VIT)
    first = jax.tree.map(lambda array: np.asarray(array, dtype), variables["params"])
    params = jax.tree.map(jnp.asarray, first)
    trained, _ = split(params, FROZEN)
    ema = jax.tree.map(jnp.array, split(first, FROZEN)[0])
    guard = initial_guard(training.guard)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, jax.jit(optimizer.init)(trained), guard, ema)
    train_step, losses = make_train_step(training), []
    for images, tokens in batches(ODD_VIT):
        state, metrics = train_step(state, {"image": images, "text": tokens})
        losses.append(float(metrics["loss"]))
    return losses, first, state
