"""Training in PyTorch that several tests compare with: the model, its batches, its loss and its learning rate."""

import math

import numpy as np
import torch
from flax.traverse_util import flatten_dict

from clip_jax.weights.verify import random_inputs
from tests.reference_models import in_float64, random_openai_model

STEPS, BATCH = 50, 8


def check(ours, expected, tolerance):
    """Every leaf, relative to its largest value."""
    expected, ours = flatten_dict(expected, sep="/"), flatten_dict(ours, sep="/")
    assert ours.keys() == expected.keys()
    largest = max((np.abs(leaf).max() for leaf in expected.values()), default=0.0)
    for path, leaf in expected.items():
        # The gradient of a key's bias is zero in exact arithmetic (softmax ignores it): only rounding is left.
        ignored = path.endswith(("key/bias", "k_proj/bias")) and np.abs(leaf).max() < 1e-9 * largest
        scale = largest if ignored else np.abs(leaf).max()
        assert scale > 0, path
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=tolerance * scale, err_msg=path)


def batches(config):
    """uint8 images and int32 tokens, anew for every step."""
    for seed in range(STEPS):
        images, tokens = random_inputs(config, BATCH, seed)
        yield np.clip(128 + 64 * images, 0, 255).astype(np.uint8), tokens


def reference_model(config):
    """OpenAI's class, trainable, in training mode, at the temperature at which training starts."""
    model = random_openai_model(config, training=True).requires_grad_(True)
    model.logit_scale.data.fill_(math.log(1 / 0.07))
    return in_float64(model)


def reference_loss(model, images, tokens):
    logits, transposed = model(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long())
    labels = torch.arange(len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(transposed, labels)) / 2


def learning_rate(settings, step):
    """Of a step, from 1: a linear warm-up, then a cosine."""
    warm = min(step / settings.warmup_steps, 1.0)
    progress = max(step - settings.warmup_steps, 0) / (STEPS - settings.warmup_steps)
    return settings.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2
