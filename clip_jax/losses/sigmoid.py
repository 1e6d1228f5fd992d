"""SigLIP's sigmoid loss (arXiv 2303.15343, algorithm 1), dense and as one device's part of a ring."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clip_jax.losses.captions import Captions, Pairs, compare
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.ring import Ring, add, feature_gradients, masked, paired_cosines, product, rotate


def sigmoid_loss(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    captions: Captions | None = None,
) -> Float[Array, ""]:
    """Every pair of the batch is a binary classification.

    Args:
      image_features: L2-normalised, float32 or bfloat16.
      text_features: likewise; row i belongs to image i, every other row is a negative.
      logit_scale: log of the factor on the cosines.
      logit_bias: added to every logit.
      captions: to take those that are equal for something else than negatives.

    Returns:
      At least float32, -log sigmoid(z logit) summed over all pairs, divided by the batch; z = 1 for a positive,
      else -1.
    """
    logits = jnp.exp(logit_scale) * product("id,jd->ij", image_features, text_features) + logit_bias
    own = jnp.eye(len(logits), dtype=bool)
    pairs = compare(captions, captions, ~own)
    towards_loss = jnp.where(own, -logits, _signs(pairs) * logits)
    return jnp.sum(jax.nn.softplus(masked(towards_loss, pairs.counts | own))) / len(logits)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def sigmoid_part(
    images: Float[Array, "local width"],
    texts: Float[Array, "local width"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    captions: Captions | None,
    ring: Ring,
) -> Float[Array, ""]:
    """Sum over this device's images and all texts of -log sigmoid(z s), z = 1 for a positive, else -1."""
    return _forward(images, texts, logit_scale, logit_bias, captions, ring)[0]


def _forward(images, texts, logit_scale, logit_bias, captions, ring):
    scale = jnp.exp(logit_scale)

    def visit(contribution, images, row_state, texts, pairs):
        logits = scale * product("id,jd->ij", images, texts) + logit_bias
        losses = jax.nn.softplus(masked(_signs(pairs) * logits, pairs.counts))
        return contribution, row_state, jnp.sum(losses)

    *_, others_loss = rotate(visit, add, ring, captions, rows=images, row_state=(), block=texts, tally=())
    positives = scale * paired_cosines(images, texts) + logit_bias
    loss = others_loss + jnp.sum(jax.nn.softplus(-positives))
    return loss, (images, texts, logit_scale, logit_bias, captions)


def _backward(ring, residuals, cotangent):
    images, texts, logit_scale, logit_bias, captions = residuals
    scale = jnp.exp(logit_scale)

    def weigh(cosines, pairs, row, column):
        signs = _signs(pairs)
        weights = signs * jax.nn.sigmoid(masked(signs * (scale * cosines + logit_bias), pairs.counts))
        return weights, (jnp.sum(weights * cosines), jnp.sum(weights))

    cosines = paired_cosines(images, texts)
    positive_weight = -jax.nn.sigmoid(-(scale * cosines + logit_bias))
    d_images, d_texts, (d_scale, d_bias) = feature_gradients(
        weigh, images, texts, (), (), captions, positive_weight, cotangent * scale, ring
    )
    d_scale += jnp.sum(positive_weight * cosines)
    d_bias += jnp.sum(positive_weight)
    return d_images, d_texts, cotangent * scale * d_scale, cotangent * d_bias, None


sigmoid_part.defvjp(_forward, _backward)


def _signs(pairs: Pairs):
    """-z of each pair besides an image and its own text: whether its loss grows with its logit, or falls."""
    return 1.0 if pairs.positive is None else 1.0 - 2.0 * pairs.positive


# SigLIP's start; neither its scale nor its bias has a bound (section 3.2, and big_vision's implementation).
SIGMOID = Contrastive(
    dense=sigmoid_loss,
    part=sigmoid_part,
    initial={"logit_scale": float(np.log(10)), "logit_bias": -10.0},
    bounds={},
)
