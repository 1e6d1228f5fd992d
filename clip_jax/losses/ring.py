"""The contrastive losses of one device among many, without the matrix of all pairs.

Runs inside `jax.shard_map`: each device holds `local` image features (the rows) and the `local` text features
that belong to them (the columns). The texts travel around the ring of devices; at every stop the device compares
its images with the visiting texts, `tile` rows at a time. The logits of one tile are all that ever exists of the
batch x batch matrix; the backward pass computes them again on a second trip. Tiling an exact loss this way is
Inf-CL's idea (arXiv 2410.17243); here one trip serves both directions of the softmax, because the sums over
columns travel with the texts while the sums over rows stay at home.

Cost, in matmul units of local x batch x width multiply-adds a device: 1 forward, 3 backward (1 to recompute, 2 for
the gradients), against 2 and 4 for two gathered, one-directional losses. A trip moves batch x width text features
past each device, and on the way back as many float32 gradients. Memory: tile x local + local x width.

Positive pairs (the diagonal) are left out of the tiles and added from row-wise dot products. That keeps relative
accuracy where the loss almost vanishes, and keeps rounding to bfloat16 in the gradients' matmuls away from the
largest terms.

Both losses return this device's part of a *sum* over examples. Add the parts by a `psum` outside these functions:
inside a custom_vjp its transpose is not taken into account.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

Tree = Any

# The logit of a pair that does not count. Finite, so that zero weight times it is zero.
_MASKED = -1e20
# The peak of an empty sum: below every logit and above the masked ones, which thus add exp(-large) = 0.
_EMPTY = 0.5 * _MASKED


class Ring(NamedTuple):
    """The devices that share the batch, in the order in which texts visit them.

    Attributes:
      axes: the mesh axes over which the batch is sharded.
      hops: (from, to) pairs of positions along the flattened axes.
      tile: rows of logits computed at a time, at most.
    """

    axes: tuple[str, ...]
    hops: tuple[tuple[int, int], ...]
    tile: int


def make_ring(mesh: Mesh, axes: tuple[str, ...], tile: int) -> Ring:
    """The ring over `axes` (the mesh's leading ones) whose hops follow the machine's wires.

    Devices with coordinates (TPUs) are visited row by row, in turns forwards and backwards, so that a hop changes
    one coordinate: on a v5e slice the compiler makes a transfer wait when any of its hops turns a corner.
    """
    devices = mesh.devices.reshape(*mesh.devices.shape[: len(axes)], -1)[..., 0].ravel()

    def place(position):
        device = devices[position]
        coordinates = (*getattr(device, "coords", (position,)), getattr(device, "core_on_chip", 0))
        return getattr(device, "slice_index", 0), *coordinates

    order = [position for *_, position in snake(sorted((*place(i), i) for i in range(len(devices))))]
    return Ring(axes, tuple(zip(order, order[1:] + order[:1], strict=True)), tile)


def snake(points: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Reorders sorted grid points so that neighbours in the list are neighbours in the grid."""
    if len(points) == 1 or not points[0]:
        return points
    rows = [(first, [point[1:] for point in row]) for first, row in groupby(points, key=lambda point: point[0])]
    path = [[(first, *point) for point in snake(row)] for first, row in rows]
    return [point for number, row in enumerate(path) for point in (reversed(row) if number % 2 else row)]


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` that keeps its operands' precision and returns float32.

    Accelerators round float32 operands unless told not to; bfloat16 operands lose nothing in one pass.
    """
    exact = jnp.promote_types(a.dtype, b.dtype) == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def paired_cosines(images: Float[Array, "local width"], texts: Float[Array, "local width"]) -> Float[Array, " local"]:
    """The dot product of each image with its own text, in float32."""
    return jnp.sum(images.astype(jnp.float32) * texts.astype(jnp.float32), axis=-1)


# --- softmax (CLIP, arXiv 2103.00020, figure 3) ------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def softmax_loss(
    images: Float[Array, "local width"],
    texts: Float[Array, "local width"],
    logit_scale: Float[Array, ""],
    ring: Ring,
) -> Float[Array, ""]:
    """Sum over the device's examples of both cross entropies, image to text and text to image.

    With logits s, the first is log sum_j exp(s_ij) - s_ii = softplus(log sum_{j != i} exp(s_ij) - s_ii).
    """
    return _softmax_forward(images, texts, logit_scale, ring)[0]


def _softmax_forward(images, texts, logit_scale, ring):
    scale = jnp.exp(logit_scale)

    def visit(column_sums, images, row_sums, texts, mask):
        cosines = mask(product("id,jd->ij", images, texts))
        return _add_exp(column_sums, cosines, scale, axis=0), _add_exp(row_sums, cosines, scale, axis=1), ()

    empty = (jnp.full_like(images[:, 0], _EMPTY, jnp.float32), jnp.zeros_like(images[:, 0], jnp.float32))
    merge = partial(_merge_exp, scale=scale)
    row_sums, column_sums, _ = _rotate(visit, merge, ring, rows=images, row_state=empty, block=texts, tally=empty)
    positives = paired_cosines(images, texts)
    row_loss, column_loss = (
        jax.nn.softplus(scale * (peak - positives) + jnp.log(total)) for peak, total in (row_sums, column_sums)
    )
    return jnp.sum(row_loss + column_loss), (images, texts, logit_scale, row_loss, column_loss)


def _softmax_backward(ring, residuals, cotangent):
    images, texts, logit_scale, row_loss, column_loss = residuals
    scale = jnp.exp(logit_scale)
    positives = paired_cosines(images, texts)

    def weigh(cosines, mask, row, column):
        # Sums of p_ij s_ij - s_ii lose digits; sums of p_ij (s_ij - s_ii) do not.
        cosines = mask(cosines)
        row_gap = scale * (cosines - row["positive"][:, None])
        column_gap = scale * (cosines - column["positive"][None, :])
        row_probability = jnp.exp(row_gap - row["loss"][:, None])
        column_probability = jnp.exp(column_gap - column["loss"][None, :])
        scale_terms = row_probability * row_gap + column_probability * column_gap
        return row_probability + column_probability, jnp.sum(scale_terms)

    row = {"positive": positives, "loss": row_loss}
    column = {"positive": positives, "loss": column_loss}
    positive_weight = jnp.expm1(-row_loss) + jnp.expm1(-column_loss)  # (p_ii - 1) + (q_ii - 1)
    d_images, d_texts, d_logit_scale = _feature_gradients(
        weigh, images, texts, row, column, positive_weight, cotangent * scale, ring
    )
    return d_images, d_texts, cotangent * d_logit_scale


softmax_loss.defvjp(_softmax_forward, _softmax_backward)


# --- sigmoid (SigLIP, arXiv 2303.15343) --------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def sigmoid_loss(
    images: Float[Array, "local width"],
    texts: Float[Array, "local width"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    ring: Ring,
) -> Float[Array, ""]:
    """Sum over the device's images and all texts of -log sigmoid(z s), z = 1 for the pair, else -1."""
    return _sigmoid_forward(images, texts, logit_scale, logit_bias, ring)[0]


def _sigmoid_forward(images, texts, logit_scale, logit_bias, ring):
    scale = jnp.exp(logit_scale)

    def visit(contribution, images, row_state, texts, mask):
        logits = scale * product("id,jd->ij", images, texts) + logit_bias
        return contribution, row_state, jnp.sum(jax.nn.softplus(mask(logits)))

    *_, negative_loss = _rotate(visit, _add, ring, rows=images, row_state=(), block=texts, tally=())
    positives = scale * paired_cosines(images, texts) + logit_bias
    loss = negative_loss + jnp.sum(jax.nn.softplus(-positives))
    return loss, (images, texts, logit_scale, logit_bias)


def _sigmoid_backward(ring, residuals, cotangent):
    images, texts, logit_scale, logit_bias = residuals
    scale = jnp.exp(logit_scale)

    def weigh(cosines, mask, row, column):
        weights = jax.nn.sigmoid(mask(scale * cosines + logit_bias))
        return weights, (jnp.sum(weights * cosines), jnp.sum(weights))

    cosines = paired_cosines(images, texts)
    positive_weight = -jax.nn.sigmoid(-(scale * cosines + logit_bias))
    d_images, d_texts, (d_scale, d_bias) = _feature_gradients(
        weigh, images, texts, (), (), positive_weight, cotangent * scale, ring
    )
    d_scale += jnp.sum(positive_weight * cosines)
    d_bias += jnp.sum(positive_weight)
    return d_images, d_texts, cotangent * scale * d_scale, cotangent * d_bias


sigmoid_loss.defvjp(_sigmoid_forward, _sigmoid_backward)


# --- what both share ---------------------------------------------------------------------------------------------


def _feature_gradients(weigh, images, texts, row, column, positive_weight, factor, ring):
    """Gradients of the features, given those of the logits: `weigh(...)` for negatives, a vector for positives."""

    def visit(d_texts, rows, d_images, block, mask):
        (images, row), (texts, column) = rows, block
        weights, scalars = weigh(product("id,jd->ij", images, texts), mask, row, column)
        weights = weights.astype(texts.dtype)
        d_images += product("ij,jd->id", weights, texts)
        d_texts += product("ij,id->jd", weights, images)
        return d_texts, d_images, scalars

    zeros = jnp.zeros_like(images, jnp.float32)
    d_images, d_texts, scalars = _rotate(
        visit, _add, ring, rows=(images, row), row_state=zeros, block=(texts, column), tally=zeros
    )
    d_images = factor * (d_images + positive_weight[:, None] * texts)
    d_texts = factor * (d_texts + positive_weight[:, None] * images)
    return d_images.astype(images.dtype), d_texts.astype(texts.dtype), scalars


def _rotate(
    visit: Callable, merge: Callable, ring: Ring, *, rows: Tree, row_state: Tree, block: Tree, tally: Tree
) -> tuple[Tree, Tree, Tree]:
    """Shows every device's block to the rows of every device, tile by tile.

    Args:
      visit: (contribution, tile of rows, tile of row_state, block, mask) -> (contribution, tile of row_state,
        scalars); `mask` takes out of a tile's logits what does not count.
      merge: combines two tallies.
      ring: the devices' order and the tile.
      rows: arrays with leading axis `local` that stay.
      row_state: arrays with leading axis `local` that stay and are updated.
      block: arrays that travel unchanged.
      tally: the empty value of what travels with the block and collects every device's contribution.

    Returns:
      row_state, the tally of the device's own block, and the scalars' sums over all visits.
    """
    shift = partial(jax.lax.ppermute, axis_name=ring.axes, perm=ring.hops)
    local = jax.tree.leaves(rows)[0].shape[0]
    count = -(-local // ring.tile)
    size = -(-local // count)
    rows, row_state = jax.tree.map(partial(_cut, count=count, size=size), (rows, row_state))

    def hop(carry, _):
        number, row_state, block, collected = carry
        # Sent before the tiles are computed, so that the transfer overlaps with them. The tally therefore travels one
        # hop late: what arrives here was collected from this block before it came.
        next_block, arriving = shift((block, collected))

        def step(carry, rows):
            first, contribution, row_state = carry
            mask = partial(_mask, first=first, local=local, own=number == 0)
            tile_state = jax.tree.map(lambda leaf: leaf[first // size], row_state)
            contribution, tile_state, scalars = visit(contribution, rows, tile_state, block, mask)
            row_state = jax.tree.map(lambda leaf, update: leaf.at[first // size].set(update), row_state, tile_state)
            return (first + size, contribution, row_state), scalars

        (_, contribution, row_state), scalars = jax.lax.scan(step, (0, tally, row_state), rows)
        return (number + 1, row_state, next_block, merge(arriving, contribution)), scalars

    carry = (0, row_state, block, tally)
    (_, row_state, _, collected), scalars = jax.lax.scan(hop, carry, length=len(ring.hops))
    row_state = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:local], row_state)
    return row_state, shift(collected), jax.tree.map(jnp.sum, scalars)


def _cut(rows: Float[Array, "local ..."], count: int, size: int) -> Float[Array, "count size ..."]:
    """Cuts axis 0 into `count` tiles of `size` rows, the last one filled up with zeros."""
    padding = [(0, count * size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(count, size, *rows.shape[1:])


def _mask(
    logits: Float[Array, "rows columns"], first: Int[Array, ""], local: int, own: Bool[Array, ""]
) -> Float[Array, "rows columns"]:
    """Takes out the positive pairs, which lie in the device's own block, and the rows that fill up a tile."""
    row = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(own & (row == column) | (row >= local), _MASKED, logits)


def _add_exp(sums, cosines, scale, axis: int):
    """Adds exp(scale * cosines) along `axis` to sums kept as (peak, total): exp(scale * peak) * total."""
    peak = jnp.maximum(sums[0], cosines.max(axis))
    total = jnp.exp(scale * (cosines - jnp.expand_dims(peak, axis))).sum(axis)
    return _merge_exp(sums, (peak, total), scale)


def _merge_exp(a, b, scale):
    peak = jnp.maximum(a[0], b[0])
    return peak, a[1] * jnp.exp(scale * (a[0] - peak)) + b[1] * jnp.exp(scale * (b[0] - peak))


def _add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)
