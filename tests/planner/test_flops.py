"""The analytic FLOP count against the products and convolutions that a trace of the model holds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from clip_jax.models import CLIP, OPENAI_MODELS, variable_shapes
from clip_jax.planner.flops import forward_flops, train_flops
from clip_jax.training.config import RunConfig
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
    assert (
        train_flops(RunConfig("x", config, batch_size=1000)) == 3 * forward_flops(config) + 6 * 1000 * config.embed_dim
    )


def test_what_is_frozen_and_what_is_not_seen_costs_less():
    def traced(method, *inputs):
        model = CLIP(tiny.VIT)
        jaxpr = jax.make_jaxpr(lambda variables: model.apply(variables, *inputs, method=method))
        return traced_flops(jaxpr(variable_shapes(tiny.VIT)).jaxpr)

    images, half = jnp.zeros((1, 32, 32, 3)), jnp.arange(8)[None]
    image, text = traced(CLIP.encode_image, images), traced(CLIP.encode_text, jnp.zeros((1, 16), jnp.int32))
    run, row = RunConfig("x", tiny.VIT, batch_size=1000), 2 * 1000 * tiny.VIT.embed_dim
    assert train_flops(run) == 3 * (image + text + row)
    frozen = replace(run, optimizer=replace(run.optimizer, frozen=("visual/*",)))
    assert train_flops(frozen) == image + 3 * text + 2 * row
    with_head = replace(run, model=replace(tiny.VIT, classes=("a", "b", "c")), loss="cross_entropy")
    assert train_flops(with_head) == 3 * (image + 2 * 3 * tiny.VIT.embed_dim)
    dropped = traced(CLIP.encode_image, images, True, half)
    assert train_flops(replace(run, patch_dropout=0.5)) == 3 * (dropped + text + row)
