"""Training a head against PyTorch in float64: loss with label smoothing, every gradient leaf, and steps of AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from clip_jax.losses import CrossEntropy
from clip_jax.models import CLIP, Execution
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing.images import Preprocess
from clip_jax.training.guard import initial_guard
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.parameters import split
from clip_jax.training.state import Training, TrainState, state_shardings
from clip_jax.training.step import make_train_step
from tests.reference_models import ODD_VIT, variables_of
from tests.reference_training import BATCH, STEPS, batches, check, learning_rate, reference_model

CLASSES, SMOOTHING, TAKEN = 6, 0.1, 3
CONFIG = dataclasses.replace(ODD_VIT, classes=tuple("abcdef"))
SETTINGS = OptimizerConfig(learning_rate=5e-4, warmup_steps=2)


def first_classifier():
    return np.random.default_rng(0).normal(size=(CLASSES, CONFIG.embed_dim))


def labelled_batches():
    for (images, _), seed in zip(batches(CONFIG), range(TAKEN), strict=False):
        yield images, np.random.default_rng(seed).integers(0, CLASSES, BATCH).astype(np.int32)


def with_head(state, classifier):
    variables = variables_of(state, ODD_VIT)["params"]
    return {**variables, "classifier": classifier}


@pytest.fixture(scope="module")
def reference():
    """(losses, gradients of the first step, parameters after the last) of image tower and head."""
    model, classifier = reference_model(ODD_VIT), torch.nn.Parameter(torch.from_numpy(first_classifier()))
    image_tower = {name: p for name, p in model.named_parameters() if name.startswith("visual.")}
    spared = {name for name in image_tower if name.endswith("bias") or "ln_" in name}
    adamw = torch.optim.AdamW(
        [
            {"params": [classifier, *(p for name, p in image_tower.items() if name not in spared)]},
            {"params": [image_tower[name] for name in spared], "weight_decay": 0.0},
        ],
        weight_decay=SETTINGS.weight_decay,
        betas=(SETTINGS.b1, SETTINGS.b2),
        eps=SETTINGS.eps,
    )
    losses, preprocess = [], Preprocess.from_config(ODD_VIT)
    for step, (images, labels) in enumerate(labelled_batches(), start=1):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(SETTINGS, step)
        adamw.zero_grad()
        pixels = torch.from_numpy(preprocess.normalize(images, np.float64)).permute(0, 3, 1, 2)
        features = torch.nn.functional.normalize(model.encode_image(pixels))
        loss = torch.nn.functional.cross_entropy(
            features @ classifier.T, torch.from_numpy(labels).long(), label_smoothing=SMOOTHING
        )
        loss.backward()
        if step == 1:
            zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            gradients = with_head({**zeros, **{n: p.grad for n, p in image_tower.items()}}, classifier.grad.numpy())
        adamw.step()
        losses.append(loss.item())
    return losses, gradients, with_head(model.state_dict(), classifier.detach().numpy())


@pytest.mark.parametrize(("mesh", "microbatches"), [((1, 1, 1), 1), ((2, 2, 2), 2)])
def test_steps_follow_pytorch_and_the_text_tower_stays(reference, mesh, microbatches):
    losses, gradients, expected = reference
    with jax.enable_x64(True):
        ours, first_moment, state, before = our_run(mesh, microbatches)
    np.testing.assert_allclose(ours, losses, rtol=1e-9)
    trained = ("classifier", "visual")
    check({name: first_moment[name] for name in trained}, {name: gradients[name] for name in trained}, 1e-9)
    check({name: state.params[name] for name in trained}, {name: expected[name] for name in trained}, 1e-9)
    assert set(first_moment) == set(trained), "no moments of what the loss does not see"
    for path, leaf in flatten_dict({"text": state.params["text"], "scale": state.params["logit_scale"]}).items():
        assert np.array_equal(leaf, flatten_dict({"text": before["text"], "scale": before["logit_scale"]})[path])


def our_run(mesh, microbatches):
    partitioner = make_partitioner(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])
    loss = CrossEntropy(SMOOTHING)
    training = Training(
        CLIP(CONFIG, Execution(dtype="float64")),
        make_optimizer(SETTINGS, STEPS),
        partitioner,
        loss,
        frozen=loss.untrained,
        microbatches=microbatches,
    )
    before = with_head(reference_model(ODD_VIT).state_dict(), first_classifier())
    params = jax.tree.map(lambda array: jnp.asarray(array, "float64"), before)
    trained, _ = split(params, training.frozen)
    guard = initial_guard(training.guard)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, training.optimizer.init(trained), guard)
    state = jax.device_put(state, state_shardings(training))
    train_step, losses = make_train_step(training), []
    for images, labels in labelled_batches():
        state, metrics = train_step(state, to_devices({"image": images, "label": labels}, partitioner))
        losses.append(float(metrics["loss"]))
        if not losses[1:]:
            moment = jax.tree.map(lambda leaf: np.array(leaf) / (1 - SETTINGS.b1), state.opt_state[0].mu)
    return losses, moment, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, before)
