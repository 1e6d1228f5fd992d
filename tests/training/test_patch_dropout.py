"""FLIP's patch dropout: which patches are seen, and what an image tower makes of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.models import CLIP, abstract_inputs
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.state import abstract_state
from clip_jax.training.step import encode, kept_patches, make_train_step
from tests import tiny

CONFIG = RunConfig("x", tiny.VIT, batch_size=64, patch_dropout=0.5, optimizer=OptimizerConfig(warmup_steps=1))
PATCHES = 16  # of tiny.VIT: 4 x 4


def kept(step, batch=64, **fields):
    training = make_training(dataclasses.replace(CONFIG, **fields))
    return np.asarray(jax.jit(partial(kept_patches, training, batch=batch))(jnp.int32(step)))


def test_each_image_has_a_share_of_its_patches_anew_in_every_step():
    first = kept(0)
    assert first.shape == (64, 8) and first.min() == 0 and first.max() == PATCHES - 1
    assert all(len(set(row)) == 8 for row in first)
    assert len({tuple(sorted(row)) for row in first}) > 60
    assert np.bincount(first.ravel(), minlength=PATCHES).min() > 15  # 32 on average
    assert not np.array_equal(first, kept(1)) and not np.array_equal(first, kept(0, seed=1))
    np.testing.assert_array_equal(first, kept(0))
    assert kept(0, patch_dropout=0.3).shape == (64, 11) and kept(0, patch_dropout=0.99).shape == (64, 1)


def test_only_the_patches_that_are_kept_matter_and_their_order_does_not():
    model, variables = CLIP(tiny.VIT), jax.tree.map(jnp.asarray, tiny.variables(tiny.VIT))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    encode_image = jax.jit(lambda images, kept: model.apply(variables, images, True, kept, method=model.encode_image))
    whole = jax.jit(lambda images: model.apply(variables, images, method=model.encode_image))(images)
    every = np.random.default_rng(1).permuted(np.tile(np.arange(PATCHES), (2, 1)), axis=1)
    np.testing.assert_allclose(encode_image(images, every), whole, rtol=1e-5, atol=1e-6)
    some, other = every[:, :5], images.copy()
    for image, row in enumerate(every[:, 5:]):
        for patch in row:
            y, x = 8 * (patch // 4), 8 * (patch % 4)
            other[image, y : y + 8, x : x + 8] = 0
    features = np.asarray(encode_image(images, some))
    np.testing.assert_allclose(encode_image(other, some), features, rtol=1e-6)
    assert np.abs(features - whole).max() > 1e-3 * np.abs(whole).max()


def test_micro_batches_see_the_same_patches():
    partitioner = make_partitioner(MeshConfig(2, 1, 1), jax.devices()[:2])
    variables, batch, patches = tiny.variables(tiny.VIT), tiny.batch(tiny.VIT, 8), jnp.asarray(kept(3, batch=8))
    variables = jax.tree.map(jnp.asarray, variables)

    @partial(jax.jit, static_argnums=2)
    def features(image, text, microbatches):
        return encode(CLIP(tiny.VIT), variables, image, text, microbatches, partitioner, patches=patches)[0]

    once, twice = (features(batch["image"], batch["text"], n) for n in (1, 2))
    np.testing.assert_allclose(once, twice, atol=1e-6)


def test_the_step_s_image_tower_works_on_what_is_kept():
    training = make_training(dataclasses.replace(CONFIG, batch_size=16, mesh=MeshConfig(1, 1, 8)))
    batch = dict(zip(("image", "text"), abstract_inputs(tiny.VIT, 16, jnp.uint8), strict=True))
    program = make_train_step(training).lower(abstract_state(training), batch).as_text()
    assert "tensor<16x9x64xf32>" in program and "tensor<16x9x256xf32>" in program and "tensor<16x17x256" not in program


def test_a_resnet_has_no_patches():
    with pytest.raises(UserError, match="patch_dropout leaves out patches of a ViT"):
        RunConfig("x", tiny.RESNET, patch_dropout=0.5)


@pytest.mark.parametrize("name", ["patch_dropout", "ema_decay"])
def test_impossible_shares_are_refused(name):
    with pytest.raises(UserError, match=f"{name} must be at least 0 and below 1, got 1.0"):
        dataclasses.replace(CONFIG, **{name: 1.0})
