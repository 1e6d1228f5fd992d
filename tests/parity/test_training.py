"""The train step against PyTorch's: loss, every gradient, running statistics and 50 steps of AdamW.

In float64 both compute the same functions to nine digits, whatever the CPU. In float32 rounding flips a ReLU now and
then (1 % of a gradient) and grows from step to step, so it is followed for as long as it does not decide the result.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_jax.models import CLIP, Execution
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing.images import Preprocess
from clip_jax.training.guard import initial_guard
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import Training, TrainState
from clip_jax.training.step import make_train_step
from tests.reference_models import ODD_RESNET, ODD_VIT, variables_of
from tests.reference_training import STEPS, batches, check, learning_rate, reference_loss, reference_model

CONFIGS = {
    "vit": ODD_VIT,
    # Fewer pixels and blocks: XLA's convolutions in float64 are plain loops.
    "resnet": dataclasses.replace(
        ODD_RESNET, vision=dataclasses.replace(ODD_RESNET.vision, image_resolution=64, layers=(1, 2, 1, 1))
    ),
}
# The paper's settings (tables 18 and 20), with a shorter warm-up.
SETTINGS = {
    "vit": OptimizerConfig(learning_rate=5e-4, warmup_steps=10),
    "resnet": OptimizerConfig(learning_rate=5e-4, b2=0.999, eps=1e-8, warmup_steps=10),
}


class Run(NamedTuple):
    """What is compared: every loss; gradients and running statistics after one step; variables after the last."""

    losses: list[float]
    gradients: dict
    statistics: dict
    variables: dict


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    """(name, PyTorch's run in float64)."""
    return request.param, reference_run(request.param)


def test_float64_is_the_same_function(reference):
    name, expected = reference
    with jax.enable_x64(True):
        ours = our_run(name, "float64", STEPS)
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=1e-9)
    assert np.ptp(expected.losses) > 0.1
    check(ours.gradients, expected.gradients, 1e-9)
    check(ours.statistics, expected.statistics, 1e-9)
    check(ours.variables, expected.variables, 1e-9)


def test_float32_follows(reference):
    name, expected = reference
    ours = our_run(name, "float32", STEPS // 5)
    np.testing.assert_allclose(ours.losses, expected.losses[: STEPS // 5], rtol=1e-3 if name == "vit" else 2e-2)
    check(ours.gradients, expected.gradients, 1e-4 if name == "vit" else 5e-2)
    check(ours.statistics, expected.statistics, 1e-5)


def reference_run(name):
    config, settings = CONFIGS[name], SETTINGS[name]
    model = reference_model(config)
    adamw, losses = reference_adamw(model, settings), []
    preprocess = Preprocess.from_config(config)
    for step, (images, tokens) in enumerate(batches(config), start=1):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings, step)
        adamw.zero_grad()
        loss = reference_loss(model, preprocess.normalize(images, np.float64), tokens)
        loss.backward()
        if step == 1:
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            first = variables_of({**dict(model.named_buffers()), **gradients}, config)
        adamw.step()
        losses.append(loss.item())
    return Run(losses, first["params"], first.get("batch_stats", {}), variables_of(model.state_dict(), config))


def reference_adamw(model, settings):
    """torch.optim.AdamW with two groups: gains and biases do not decay."""
    norms = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    gains = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    groups = {False: [], True: []}
    for name, parameter in model.named_parameters():
        spared = id(parameter) in gains or name.endswith("bias") or name == "logit_scale"
        groups[not spared].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
    )


def our_run(name, dtype, steps):
    config, settings = CONFIGS[name], SETTINGS[name]
    partitioner = make_partitioner(MeshConfig(1, 1, 1), jax.devices()[:1])
    training = Training(CLIP(config, Execution(dtype=dtype)), make_optimizer(settings, STEPS), partitioner)
    variables = variables_of(reference_model(config).state_dict(), config)
    params = jax.tree.map(lambda array: jnp.asarray(array, dtype), variables["params"])
    statistics = jax.tree.map(lambda array: jnp.asarray(array, dtype), variables.get("batch_stats", {}))
    moments, guard = jax.jit(training.optimizer.init)(params), initial_guard(training.guard)
    state = TrainState(jnp.zeros((), jnp.int32), params, statistics, moments, guard)
    train_step, losses = make_train_step(training), []
    for _, (images, tokens) in zip(range(steps), batches(config), strict=False):
        state, metrics = train_step(state, {"image": images, "text": tokens})
        losses.append(float(metrics["loss"]))
        if not losses[1:]:
            # AdamW's first moment after one step is (1 - b1) times the gradient.
            moments = jax.tree.map(np.asarray, state.opt_state[0].mu)
            gradients = jax.tree.map(lambda moment: moment / (1 - settings.b1), moments)
            statistics = jax.tree.map(np.array, state.batch_stats)
    return Run(losses, gradients, statistics, jax.tree.map(np.asarray, state.variables))
