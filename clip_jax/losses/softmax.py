"""CLIP's softmax loss (arXiv 2103.00020, figure 3), dense and as one device's part of a ring."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clip_jax.losses.loss import Loss
from clip_jax.losses.ring import EMPTY, Ring, feature_gradients, masked, paired_cosines, product, rotate


def softmax_loss(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
) -> Float[Array, ""]:
    """The mean of the two cross entropies, image to text and text to image.

    Args:
      image_features: L2-normalised, float32 or bfloat16.
      text_features: likewise; row i belongs to image i, every other row is a negative.
      logit_scale: log of the factor on the cosines.

    Returns:
      At least float32, the mean over the batch.
    """
    scale = jnp.exp(logit_scale)
    cosines = product("id,jd->ij", image_features, text_features)
    positives = paired_cosines(image_features, text_features)
    # The cross entropy of row i is log sum_j exp(s_ij - s_ii); subtracting inside keeps a small loss accurate.
    image_to_text = jax.nn.logsumexp(scale * (cosines - positives[:, None]), axis=1)
    text_to_image = jax.nn.logsumexp(scale * (cosines - positives[None, :]), axis=0)
    return jnp.mean(image_to_text + text_to_image) / 2


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def softmax_part(
    images: Float[Array, "local width"],
    texts: Float[Array, "local width"],
    logit_scale: Float[Array, ""],
    ring: Ring,
) -> Float[Array, ""]:
    """Sum over this device's examples of the mean of both cross entropies.

    With logits s, the first is log sum_j exp(s_ij) - s_ii = softplus(log sum_{j != i} exp(s_ij) - s_ii).
    """
    return _forward(images, texts, logit_scale, ring)[0]


def _forward(images, texts, logit_scale, ring):
    scale = jnp.exp(logit_scale)

    def visit(column_sums, images, row_sums, texts, counts):
        cosines = masked(product("id,jd->ij", images, texts), counts)
        return _add_exp(column_sums, cosines, scale, axis=0), _add_exp(row_sums, cosines, scale, axis=1), ()

    positives = paired_cosines(images, texts)
    empty = (jnp.full_like(positives, EMPTY), jnp.zeros_like(positives))
    merge = partial(_merge_exp, scale=scale)
    row_sums, column_sums, _ = rotate(visit, merge, ring, rows=images, row_state=empty, block=texts, tally=empty)
    row_loss, column_loss = (
        jax.nn.softplus(scale * (peak - positives) + jnp.log(total)) for peak, total in (row_sums, column_sums)
    )
    return jnp.sum(row_loss + column_loss) / 2, (images, texts, logit_scale, row_loss, column_loss)


def _backward(ring, residuals, cotangent):
    images, texts, logit_scale, row_loss, column_loss = residuals
    scale, cotangent = jnp.exp(logit_scale), cotangent / 2
    positives = paired_cosines(images, texts)

    def weigh(cosines, counts, row, column):
        # Sums of p_ij s_ij - s_ii lose digits; sums of p_ij (s_ij - s_ii) do not.
        cosines = masked(cosines, counts)
        row_gap = scale * (cosines - row["positive"][:, None])
        column_gap = scale * (cosines - column["positive"][None, :])
        row_probability = jnp.exp(row_gap - row["loss"][:, None])
        column_probability = jnp.exp(column_gap - column["loss"][None, :])
        scale_terms = row_probability * row_gap + column_probability * column_gap
        return row_probability + column_probability, jnp.sum(scale_terms)

    row = {"positive": positives, "loss": row_loss}
    column = {"positive": positives, "loss": column_loss}
    positive_weight = jnp.expm1(-row_loss) + jnp.expm1(-column_loss)  # (p_ii - 1) + (q_ii - 1)
    d_images, d_texts, d_logit_scale = feature_gradients(
        weigh, images, texts, row, column, positive_weight, cotangent * scale, ring
    )
    return d_images, d_texts, cotangent * d_logit_scale


softmax_part.defvjp(_forward, _backward)


def _add_exp(sums, cosines, scale, axis: int):
    """Add exp(scale * cosines) along `axis` to sums kept as (peak, total): exp(scale * peak) * total."""
    peak = jnp.maximum(sums[0], cosines.max(axis))
    total = jnp.exp(scale * (cosines - jnp.expand_dims(peak, axis))).sum(axis)
    return _merge_exp(sums, (peak, total), scale)


def _merge_exp(a, b, scale):
    peak = jnp.maximum(a[0], b[0])
    return peak, a[1] * jnp.exp(scale * (a[0] - peak)) + b[1] * jnp.exp(scale * (b[0] - peak))


# The paper's first temperature, 0.07, and its bound: logits are never scaled by more than 100 (section 2.5).
SOFTMAX = Loss(
    dense=softmax_loss,
    part=softmax_part,
    initial={"logit_scale": float(np.log(1 / 0.07))},
    bounds={"logit_scale": (0.0, float(np.log(100)))},
)
