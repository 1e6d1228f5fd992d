"""The analytic FLOP count against the products and convolutions that a trace of the model holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from clip_jax.models import CLIP, OPENAI_MODELS
from clip_jax.planner.flops import forward_flops, train_flops
from tests import tiny


def traced_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inputs = [variable.aval for variable in equation.invars]
        output = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * output.size * int(np.prod([inputs[0].shape[axis] for axis in contracted]))
        elif equation.primitive.name == "conv_general_dilated":
            total += 2 * output.size * inputs[1].size // output.shape[-1]
        inner = sum(traced_flops(sub) for sub in jaxprs_in_params(equation.params))
        total += equation.params.get("length", 1) * inner
    return total


@pytest.mark.parametrize("config", [OPENAI_MODELS["ViT-L/14@336px"], tiny.VIT, tiny.RESNET])
def test_counts_what_the_model_multiplies(config):
    model = CLIP(config)
    images = jnp.zeros((1, config.vision.image_resolution, config.vision.image_resolution, 3))
    tokens = jnp.zeros((1, config.text.context_length), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    jaxpr = jax.make_jaxpr(model.apply)(variables, images, tokens)
    similarity = 2 * config.embed_dim
    assert traced_flops(jaxpr.jaxpr) - similarity == forward_flops(config)


# open_clip's docs/model_profile.csv, in GFLOP for an image and a text.
@pytest.mark.parametrize(
    "name, published", [("ViT-B/32", 14.78), ("ViT-B/16", 41.09), ("ViT-L/14", 175.33), ("ViT-L/14@336px", 395.22)]
)
def test_agrees_with_published_counts(name, published):
    assert round(forward_flops(OPENAI_MODELS[name]) / 1e9, 2) == published


def test_training_costs_three_forward_passes_and_the_similarities():
    config = OPENAI_MODELS["ViT-B/32"]
    assert train_flops(config, 1000) == 3 * forward_flops(config) + 6 * 1000 * config.embed_dim
