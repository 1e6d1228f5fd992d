"""CLIP's softmax loss (arXiv 2103.00020, figure 3), dense and as one device's part of a ring."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clip_jax.losses.captions import Captions, Pairs, compare, less_targets
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.ring import EMPTY, Ring, add, feature_gradients, masked, paired_cosines, product, rotate


def softmax_loss(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    captions: Captions | None = None,
) -> Float[Array, ""]:
    """The mean of the two cross entropies, image to text and text to image.

    Args:
      image_features: L2-normalised, float32 or bfloat16.
      text_features: likewise; row i belongs to image i, every other row is a negative.
      logit_scale: log of the factor on the cosines.
      captions: to take those that are equal for something else than negatives.

    Returns:
      At least float32, the mean over the batch.
    """
    own = jnp.eye(len(image_features), dtype=bool)
    pairs = compare(captions, captions, ~own)
    scale = jnp.exp(logit_scale)
    cosines = product("id,jd->ij", image_features, text_features)
    positives = paired_cosines(image_features, text_features)

    def cross_entropy(gaps: Float[Array, "batch batch"], axis: int) -> Float[Array, " batch"]:
        # That of row i is log sum_j exp(s_ij - s_ii); subtracting inside keeps a small loss accurate.
        loss = jax.nn.logsumexp(masked(scale * gaps, pairs.counts | own), axis)
        gap, repeats = _repeats(gaps, pairs, axis)
        return loss - scale * gap / (1 + repeats)

    image_to_text = cross_entropy(cosines - positives[:, None], axis=1)
    text_to_image = cross_entropy(cosines - positives[None, :], axis=0)
    return jnp.mean(image_to_text + text_to_image) / 2


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def softmax_part(
    images: Float[Array, "local width"],
    texts: Float[Array, "local width"],
    logit_scale: Float[Array, ""],
    captions: Captions | None,
    ring: Ring,
) -> Float[Array, ""]:
    """Sum over this device's examples of the mean of both cross entropies.

    With logits s, the first is log sum_j exp(s_ij) - s_ii = softplus(log sum_{j != i} exp(s_ij) - s_ii), less the mean
    of s_ij - s_ii over the n positives j of i. The second has the same mean over the columns. As equal captions are
    positives of each other, with the same n, the means of both directions have the same sum over the batch.
    """
    return _forward(images, texts, logit_scale, captions, ring)[0]


def _forward(images, texts, logit_scale, captions, ring):
    scale = jnp.exp(logit_scale)

    def visit(column_sums, rows, row_state, texts, pairs):
        (images, positives), (row_sums, repeats) = rows, row_state
        cosines = product("id,jd->ij", images, texts)
        repeats = add(repeats, _repeats(cosines - positives[:, None], pairs, axis=1))
        cosines = masked(cosines, pairs.counts)
        row_sums = _add_exp(row_sums, cosines, scale, axis=1)
        return _add_exp(column_sums, cosines, scale, axis=0), (row_sums, repeats), ()

    positives = paired_cosines(images, texts)
    zeros = jnp.zeros_like(positives)
    empty = (jnp.full_like(positives, EMPTY), zeros)
    (row_sums, (gap, repeats)), column_sums, _ = rotate(
        visit,
        partial(_merge_exp, scale=scale),
        ring,
        captions,
        rows=(images, positives),
        row_state=(empty, (zeros, zeros)),
        block=texts,
        tally=empty,
    )
    row_loss, column_loss = (
        jax.nn.softplus(scale * (peak - positives) + jnp.log(total)) for peak, total in (row_sums, column_sums)
    )
    share = 1 / (1 + repeats)
    loss = jnp.sum((row_loss + column_loss) / 2 - scale * gap * share)
    return loss, (images, texts, logit_scale, captions, row_loss, column_loss, share)


def _backward(ring, residuals, cotangent):
    images, texts, logit_scale, captions, row_loss, column_loss, share = residuals
    scale, cotangent = jnp.exp(logit_scale), cotangent / 2
    positives = paired_cosines(images, texts)

    def weigh(cosines, pairs, row, column):
        # Sums of p_ij s_ij - s_ii lose digits; sums of p_ij (s_ij - s_ii) do not.
        cosines = masked(cosines, pairs.counts)
        row_gap = scale * (cosines - row["positive"][:, None])
        column_gap = scale * (cosines - column["positive"][None, :])
        row_excess = less_targets(jnp.exp(row_gap - row["loss"][:, None]), pairs, row["share"])
        column_excess = less_targets(jnp.exp(column_gap - column["loss"][None, :]), pairs, row["share"])
        return row_excess + column_excess, jnp.sum(row_excess * row_gap + column_excess * column_gap)

    row = {"positive": positives, "loss": row_loss, "share": share}
    column = {"positive": positives, "loss": column_loss}
    # (p_ii - share) + (q_ii - share)
    positive_weight = jnp.expm1(-row_loss) + jnp.expm1(-column_loss) + 2 * (1 - share)
    d_images, d_texts, d_logit_scale = feature_gradients(
        weigh, images, texts, row, column, captions, positive_weight, cotangent * scale, ring
    )
    return d_images, d_texts, cotangent * d_logit_scale, None


softmax_part.defvjp(_forward, _backward)


def _repeats(gaps, pairs: Pairs, axis: int):
    """Along `axis`, the sum of the gaps at the positives besides an image's own text, and how many these are."""
    if pairs.positive is None:
        return (jnp.zeros_like(gaps, shape=gaps.shape[1 - axis]),) * 2
    return jnp.sum(gaps * pairs.positive, axis), jnp.sum(pairs.positive, axis, dtype=gaps.dtype)


def _add_exp(sums, cosines, scale, axis: int):
    """Add exp(scale * cosines) along `axis` to sums kept as (peak, total): exp(scale * peak) * total."""
    peak = jnp.maximum(sums[0], cosines.max(axis))
    total = jnp.exp(scale * (cosines - jnp.expand_dims(peak, axis))).sum(axis)
    return _merge_exp(sums, (peak, total), scale)


def _merge_exp(a, b, scale):
    peak = jnp.maximum(a[0], b[0])
    return peak, a[1] * jnp.exp(scale * (a[0] - peak)) + b[1] * jnp.exp(scale * (b[0] - peak))


# The paper's first temperature, 0.07, and its bound: logits are never scaled by more than 100 (section 2.5).
SOFTMAX = Contrastive(
    dense=softmax_loss,
    part=softmax_part,
    initial={"logit_scale": float(np.log(1 / 0.07))},
    bounds={"logit_scale": (0.0, float(np.log(100)))},
)
