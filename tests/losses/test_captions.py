"""Losses that know captions that are there more than once, against PyTorch in float64 from the whole matrix."""

import itertools
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_jax.errors import UserError
from clip_jax.losses import CONTRASTIVE, SOFTMAX, captions_of
from clip_jax.losses.captions import fingerprints
from clip_jax.models import CLIP
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.config import RunConfig
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import Training, initial_state
from clip_jax.training.step import make_train_step
from tests import tiny

BATCH, WIDTH, TILE = 56, 12, 5  # 7 rows per device on 8 devices: two tiles, the last one filled up
SCALARS = {"softmax": (np.log(14.3),), "sigmoid": (np.log(14.3), -3.0)}
# Which caption each image has: all different, some equal within and across devices, two classes, all equal.
GROUPS = {
    "none": np.arange(BATCH),
    "some": np.where(np.arange(BATCH) % 3 == 0, np.arange(BATCH) // 12, np.arange(BATCH) + BATCH),
    "two classes": (np.arange(BATCH) ** 2 % 7) % 2,
    "all": np.zeros(BATCH, int),
}


def over(*sizes):
    return make_partitioner(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def features():
    rows = np.random.default_rng(0).normal(size=(2, BATCH, WIDTH))
    return rows / np.linalg.norm(rows, axis=2, keepdims=True)


def tokens_of(groups):
    """int32 (batch, 16): a caption per group."""
    return tiny.tokens(tiny.VIT, 2 * BATCH)[groups]


def reference(name, groups, repeated):
    """[loss, gradients of images, texts and scalars]."""
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (*features(), *SCALARS[name])]
    images, texts, logit_scale, *bias = leaves
    logits = logit_scale.exp() * images @ texts.T + sum(bias)
    own, equal = torch.eye(BATCH, dtype=torch.float64), torch.from_numpy(groups[:, None] == groups[None, :]).double()
    positive = equal if repeated == "positives" else own
    counts = own + (1 - equal) if repeated == "ignored" else torch.ones_like(own)
    if name == "softmax":
        logits = logits + torch.where(counts > 0, 0.0, -torch.inf)
        targets = positive / positive.sum(1, keepdim=True)
        cross_entropies = [torch.where(targets > 0, targets * s.log_softmax(1), 0).sum(1) for s in (logits, logits.T)]
        loss = -sum(cross_entropies).mean() / 2
    else:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, positive, reduction="none")
        loss = (counts * losses).sum() / BATCH
    loss.backward()
    return [loss.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


@lru_cache
def compiled(name, repeated, devices):
    """The loss and its gradients: dense (no devices), or over a mesh of so many."""
    loss = CONTRASTIVE[name]

    def value(images, texts, *scalars, tokens):
        captions = captions_of(tokens, repeated)
        if not devices:
            return loss.dense(images, texts, *scalars, captions)
        params = dict(zip(loss.initial, scalars, strict=True))
        return loss.over_mesh(images, texts, params, over(devices, 1, 1), TILE, captions)

    return jax.jit(jax.value_and_grad(value, argnums=tuple(range(2 + len(loss.initial)))))


def ours(name, groups, repeated, devices):
    with jax.enable_x64(True):
        scalars = map(np.float64, SCALARS[name])
        value, gradients = compiled(name, repeated, devices)(*features(), *scalars, tokens=tokens_of(groups))
        return [np.asarray(leaf) for leaf in (value, *gradients)]


@pytest.mark.parametrize("devices", [0, 1, 8], ids=["dense", "ring of 1", "ring of 8"])
@pytest.mark.parametrize("repeated", ["positives", "ignored"])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_loss_and_every_gradient_are_the_definition(name, repeated, devices):
    for kind, groups in GROUPS.items():
        expected = reference(name, groups, repeated)
        for got, want in zip(ours(name, groups, repeated, devices), expected, strict=True):
            # Nothing is left to learn where all captions are one and such pairs are ignored.
            scale = np.abs(want).max() or 1.0
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * scale, err_msg=kind)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_different_captions_give_the_plain_loss(name):
    plain = ours(name, GROUPS["none"], "negatives", 8)
    for repeated in ("positives", "ignored"):
        for got, want in zip(ours(name, GROUPS["none"], repeated, 8), plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


def test_positives_with_equal_features_are_the_plain_softmax():
    groups = GROUPS["two classes"]
    with jax.enable_x64(True):
        images, table = map(jnp.asarray, features())

        def loss(images, table, repeated):
            captions = captions_of(jnp.asarray(tokens_of(groups)), repeated)
            return CONTRASTIVE["softmax"].dense(images, table[groups], jnp.log(14.3), captions)

        results = [
            jax.tree.leaves(jax.value_and_grad(partial(loss, repeated=repeated), argnums=(0, 1))(images, table))
            for repeated in ("negatives", "positives")
        ]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_float32_keeps_its_digits():
    groups = GROUPS["two classes"]
    images, texts = features().astype(np.float32)
    for name, devices in itertools.product(CONTRASTIVE, (0, 8)):
        scalars = map(np.float32, SCALARS[name])
        value, gradients = compiled(name, "positives", devices)(images, texts, *scalars, tokens=tokens_of(groups))
        for got, want in zip((value, *gradients), reference(name, groups, "positives"), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("repeated", ["positives", "ignored"])
def test_memory_is_that_of_the_ring(repeated):
    """No more than the plain ring but the tile's booleans and a few numbers per example; nothing is gathered."""

    def compile_loss(repeated):
        rows = jax.ShapeDtypeStruct((8192, 64), jnp.float32)
        tokens, scale = jax.ShapeDtypeStruct((8192, 16), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)

        def loss(images, texts, scale, tokens):
            captions = captions_of(tokens, repeated)
            return CONTRASTIVE["softmax"].over_mesh(images, texts, {"logit_scale": scale}, over(8, 1, 1), 128, captions)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(rows, rows, scale, tokens).compile()

    plain, aware = compile_loss("negatives"), compile_loss(repeated)
    tile, examples = 128 * 1024, 1024
    more = aware.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    assert more < 2 * 4 * tile + 64 * examples
    assert "all-gather" not in aware.as_text()


def test_fingerprints_tell_any_two_rows_apart():
    rows = [np.arange(77)]
    rows += [np.where(np.arange(77) == place, token, rows[0]) for place in (0, 5, 76) for token in (256, 2**15, 49407)]
    rows += [np.roll(rows[0], 1), rows[0][::-1], 2 * rows[0], rows[0] + 1, np.zeros(77)]
    rows += [np.where(np.isin(np.arange(77), (a, a + 1)), 76 - rows[0], rows[0]) for a in range(30)]
    rows = np.unique(np.int32(rows), axis=0)
    marks = np.asarray(fingerprints(jnp.asarray(np.concatenate([rows, rows]))))
    np.testing.assert_array_equal(marks[: len(rows)], marks[len(rows) :])
    for column in range(2):
        assert len(np.unique(marks[:, column])) == len(rows)
    assert not np.any(marks[:, 0] == marks[:, 1])


def test_fingerprints_of_many_captions_are_all_different():
    tokens = np.random.default_rng(0).integers(0, 3, (200_000, 40), dtype=np.int32)
    tokens = np.unique(tokens, axis=0)
    marks = np.asarray(fingerprints(jnp.asarray(tokens)))
    assert len(np.unique(marks, axis=0)) == len(tokens)
    # 32 bits alone confuse some 5 of 2 x 10^10 pairs.
    assert len(tokens) - len(np.unique(marks[:, 0])) < 30


def test_a_train_step_compares_captions():
    """One caption for the whole batch: nothing is left to compare where such pairs are ignored."""
    batch = tiny.batch(tiny.VIT, 8)
    batch["text"][:] = batch["text"][0]
    optimizer, partitioner = make_optimizer(OptimizerConfig(warmup_steps=1), 10), over(1, 1, 1)
    training = Training(CLIP(tiny.VIT), optimizer, partitioner, loss=replace(SOFTMAX, repeated_captions="ignored"))
    _, metrics = make_train_step(training)(initial_state(training, 0), to_devices(batch, partitioner))
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0


def test_another_word_is_refused():
    with pytest.raises(
        UserError, match="repeated_captions must be one of negatives, positives, ignored; got 'positive'"
    ):
        RunConfig(name="x", model=tiny.VIT, repeated_captions="positive")
