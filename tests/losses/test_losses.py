"""The ring losses against float64 NumPy: values, every gradient leaf, memory and collectives.

One bound is looser than the others: at temperature 100 with perfectly aligned features the softmax loss is about
exp(-25), and rounding exp(logit_scale) to float32 alone (6e-8, times a gap of 25 to 100) moves it by some 1e-6.
"""

import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.losses import CONTRASTIVE, ring
from clip_jax.parallel import MeshConfig, make_partitioner

BATCH, WIDTH = 184, 32  # 23 rows a device on 8 devices, 46 on 4
MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 1)]
TILES = [23, 8]  # divides the local batch; fills up the last tile (23 = 3 x 8 - 1, 46 = 6 x 8 - 2)
TEMPERATURES = [1.0, 14.3, 100.0]
BIAS = -10.0
LEAVES = ["loss", "images", "texts", "logit_scale", "logit_bias"]


def over(shape):
    return make_partitioner(MeshConfig(*shape), jax.devices()[: np.prod(shape)])


def make_features(kind, seed=0):
    generator = np.random.default_rng(seed)
    images, texts = generator.normal(size=(2, BATCH, WIDTH))
    if kind == "related":
        texts += images
    elif kind == "duplicates":
        images[BATCH // 2 :] = images[: BATCH // 2]
        texts[::3] = texts[0]
    elif kind == "aligned":
        texts = images
    elif kind == "equal":
        images[:] = texts[:] = images[0]
    return [np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (images, texts)]


def reference(name, images, texts, logit_scale, logit_bias=0.0):
    """Loss and gradients in float64 from the whole matrix, positives apart so that tiny losses keep their digits."""
    images, texts, logit_scale = np.float64(images), np.float64(texts), np.float64(logit_scale)
    scale, batch = np.exp(logit_scale), len(images)
    cosines = images @ texts.T
    positive = np.diag(cosines)
    if name == "softmax":
        weights = np.zeros_like(cosines)
        d_logit_scale = loss = 0.0
        for gap in (scale * (cosines - positive[:, None]), scale * (cosines - positive[None, :]).T):
            np.fill_diagonal(gap, -np.inf)
            nll = np.logaddexp(0.0, np.logaddexp.reduce(gap, axis=1))
            probabilities = np.exp(gap - nll[:, None])
            np.fill_diagonal(probabilities, np.expm1(-nll))
            np.fill_diagonal(gap, 0.0)
            loss += nll.mean() / 2
            d_logit_scale += np.sum(probabilities * gap) / (2 * batch)
            weights = (weights + probabilities / (2 * batch)).T
        return loss, scale * weights @ texts, scale * weights.T @ images, d_logit_scale
    signs = 2 * np.eye(batch) - 1
    logits = scale * cosines + logit_bias
    loss = np.logaddexp(0.0, -signs * logits).sum() / batch
    weights = -signs / (1 + np.exp(signs * logits)) / batch
    d_features = scale * weights @ texts, scale * weights.T @ images
    return loss, *d_features, np.sum(weights * scale * cosines), weights.sum()


def arguments(name, kind, temperature, seed=0):
    scalars = [np.float32(np.log(temperature))] + [np.float32(BIAS)] * (name == "sigmoid")
    return [*make_features(kind, seed), *scalars]


def ring_loss(name, partitioner, tile):
    loss = CONTRASTIVE[name]

    def value(images, texts, *parameters):
        return loss.over_mesh(images, texts, dict(zip(loss.initial, parameters, strict=True)), partitioner, tile)

    return value


def value_and_gradients(name, loss):
    gradient = jax.value_and_grad(loss, argnums=tuple(range(2 + len(CONTRASTIVE[name].initial))))
    return jax.jit(lambda *values: jax.tree.leaves(gradient(*values)))


@lru_cache
def compiled_ring(name, shape, tile):
    return value_and_gradients(name, ring_loss(name, over(shape), tile))


def assert_close(actual, expected, bounds, floor=0.0):
    """Bounds are on max |difference| over max |expected|; `floor` stands in for an expected value of zero."""
    for leaf, got, want in zip(LEAVES, actual, expected, strict=False):
        error = np.max(np.abs(np.float64(got) - want))
        magnitude = np.max(np.abs(want)) + floor
        bound = bounds.get(leaf, bounds["gradients"])
        assert error <= bound * magnitude, f"{leaf}: relative error {error / magnitude:.2e} exceeds {bound}"


FLOAT32 = {"loss": 1e-6, "gradients": 1e-5}
FLOAT64 = {"loss": 1e-12, "gradients": 1e-11}


@pytest.mark.parametrize(("shape", "tile"), [*itertools.product(MESHES, TILES), ((8, 1, 1), 1000)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_ring_is_the_float64_loss(name, shape, tile):
    for kind, temperature in itertools.product(["random", "related", "duplicates", "aligned"], TEMPERATURES):
        values = arguments(name, kind, temperature)
        vanishing = name == "softmax" and kind == "aligned" and temperature == 100
        bounds = {"loss": 1e-5, "gradients": 2e-5} if vanishing else FLOAT32
        assert_close(compiled_ring(name, shape, tile)(*values), reference(name, *values), bounds)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_dense_and_reference_are_the_textbook_loss(name, temperature):
    """PyTorch's own losses in float64 are the judge of both."""
    torch = pytest.importorskip("torch")
    values = arguments(name, "related", temperature)
    leaves = [torch.tensor(np.float64(value), requires_grad=True) for value in values]
    logits = leaves[2].exp() * leaves[0] @ leaves[1].T
    if name == "softmax":
        labels = torch.arange(BATCH)
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    else:
        targets = torch.eye(BATCH, dtype=torch.float64)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits + leaves[3], targets, reduction="sum")
        loss = loss / BATCH
    loss.backward()
    expected = [loss.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]
    assert_close(reference(name, *values), expected, {"loss": 1e-12, "gradients": 1e-12})
    assert_close(value_and_gradients(name, CONTRASTIVE[name].dense)(*values), expected, FLOAT32)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_order_of_the_batch_does_not_matter(name):
    loss = compiled_ring(name, (4, 2, 1), 8)
    values = arguments(name, "related", 14.3)
    expected = reference(name, *values)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(BATCH)
        value, *gradients = loss(values[0][order], values[1][order], *values[2:])
        restored = [gradient[np.argsort(order)] for gradient in gradients[:2]]
        assert_close([value, *restored, *gradients[2:]], expected, FLOAT32)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_all_features_equal(name, temperature):
    """The softmax gradients vanish; what rounding leaves, in float64, is measured against one pair's gradient."""
    values = [np.float64(value) for value in arguments(name, "equal", temperature)]
    with jax.enable_x64(True):
        actual = compiled_ring(name, (8, 1, 1), 8)(*values)
    assert_close(actual, reference(name, *values), FLOAT64, floor=temperature / BATCH)
    if name == "softmax":
        np.testing.assert_allclose(actual[0], np.log(BATCH), rtol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_one_pair(name):
    images, texts, *scalars = arguments(name, "random", 14.3)
    actual = compiled_ring(name, (1, 1, 1), 8)(images[:1], texts[:1], *scalars)
    assert_close(actual, reference(name, images[:1], texts[:1], *scalars), FLOAT32, floor=1e-30)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_bfloat16_features(name, temperature):
    """Only the features' gradients are rounded: their weights and their result, by up to 2^-9 each."""
    images, texts, *scalars = arguments(name, "duplicates", temperature)
    images, texts = (jnp.asarray(rows, jnp.bfloat16) for rows in (images, texts))
    actual = compiled_ring(name, (4, 2, 1), 8)(images, texts, *scalars)
    assert [leaf.dtype for leaf in actual[:3]] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    bounds = {"loss": 1e-6, "images": 2**-7, "texts": 2**-7, "gradients": 1e-5}
    assert_close(actual, reference(name, images, texts, *scalars), bounds)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_keep_the_precision_of_their_operands(dtype, precision):
    """Invisible on the CPU, and decisive on TPUs, which round float32 operands to bfloat16 by default."""
    a = jnp.ones((2, 2), dtype)
    assert ring.product("ij,jk->ik", a, a).dtype == jnp.float32
    assert f"Precision.{precision}" in str(jax.make_jaxpr(partial(ring.product, "ij,jk->ik"))(a, a))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_sharded_and_donated_features(name):
    """Gradients take the place of the features; a factor on the loss reaches every leaf."""
    partitioner = over((4, 2, 1))
    values = arguments(name, "related", 14.3)
    shardings = [partitioner.batch_sharding] * 2 + [partitioner.replicated] * (len(values) - 2)
    loss = ring_loss(name, partitioner, tile=8)
    gradients = jax.jit(
        jax.grad(lambda *values: 2.5 * loss(*values), argnums=tuple(range(len(values)))),
        out_shardings=tuple(shardings),
        donate_argnums=(0, 1),
    )
    placed = [jax.device_put(value, where) for value, where in zip(values, shardings, strict=True)]
    actual = gradients(*placed)
    assert placed[0].is_deleted() and placed[1].is_deleted()
    assert all(leaf.sharding == where for leaf, where in zip(actual, shardings, strict=True))
    loss_value, *expected = reference(name, *values)
    assert_close([loss_value, *actual], [loss_value, *(2.5 * leaf for leaf in expected)], FLOAT32)


def test_memory_does_not_grow_with_the_global_batch():
    """8 times the local batch over 8 devices: one device holds as much as before, and nothing is gathered."""

    def compile_loss(shape, batch):
        features = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        return (
            value_and_gradients("softmax", ring_loss("softmax", over(shape), 128))
            .lower(features, features, scale)
            .compile()
        )

    single, ring_of_8 = compile_loss((1, 1, 1), 1024), compile_loss((8, 1, 1), 8192)
    feature_bytes, tile_bytes = 1024 * 64 * 4, 128 * 1024 * 4
    temporaries = ring_of_8.memory_analysis().temp_size_in_bytes
    assert temporaries < 8 * tile_bytes + 12 * feature_bytes
    assert temporaries < single.memory_analysis().temp_size_in_bytes + 8 * feature_bytes
    assert "collective-permute" in ring_of_8.as_text()
    assert "all-gather" not in ring_of_8.as_text()


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_any_order_of_visits_gives_the_same_loss(name, monkeypatch):
    monkeypatch.setattr(ring, "snake", lambda points: [points[i] for i in (3, 0, 7, 5, 1, 6, 2, 4)])
    values = arguments(name, "related", 14.3)
    actual = value_and_gradients(name, ring_loss(name, over((2, 4, 1)), 8))(*values)
    assert_close(actual, reference(name, *values), FLOAT32)


@pytest.mark.parametrize("grid", [(1, 4, 4, 1), (2, 2, 4), (4, 2, 2, 2), (7,)], ids=str)
def test_snake_steps_to_neighbours(grid):
    points = list(itertools.product(*map(range, grid)))
    path = ring.snake(points)
    assert sorted(path) == points
    for here, there in itertools.pairwise(path):
        assert np.abs(np.subtract(here, there)).sum() == 1


def test_mistakes_name_what_would_work():
    features = jnp.ones((183, WIDTH))
    with pytest.raises(UserError, match=r"multiple of 8 .* got 183; try 176 or 184"):
        ring_loss("softmax", over((4, 2, 1)), 8)(features, features, jnp.float32(0))
