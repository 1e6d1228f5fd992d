"""How devices compare all images with all texts of the global batch, without the matrix of all pairs.

Runs inside `jax.shard_map`: each device holds `local` image features (the rows) and the `local` text features
that belong to them (the columns). The texts travel around the ring of devices; at every stop the device compares
its images with the visiting texts, `tile` rows at a time. The logits of one tile are all that ever exists of the
batch x batch matrix; the backward pass computes them again on a second trip. Tiling an exact loss this way is
Inf-CL's idea (arXiv 2410.17243); here one trip serves both directions of the softmax, because the sums over
columns travel with the texts while the sums over rows stay at home.

Cost per device, in matmul units of local x batch x width multiply-adds: 1 forward, 3 backward (1 to recompute, 2 for
the gradients), against 2 and 4 for two gathered, one-directional losses. A trip moves batch x width text features
past each device, and on the way back as many float32 gradients. Memory: tile x local + local x width.

An image and its own text (the diagonal) are left out of the tiles and added from row-wise dot products. That keeps
relative accuracy where the loss almost vanishes, and keeps rounding to bfloat16 in the gradients' matmuls away from
the largest terms.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from clip_jax.losses.captions import Captions, compare
from clip_jax.precision import at_least_float32, wide_dtype

Tree = Any

# The logit of a pair that does not count. Finite, so that zero weight times it is zero.
_MASKED = -1e20
# The peak of an empty sum: below every logit and above the masked ones, which thus add exp(-large) = 0.
EMPTY = 0.5 * _MASKED


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

    Devices with coordinates (TPUs) are visited row by row, forwards and backwards alternately, so that a hop changes
    one coordinate: on a v5e slice the compiler makes a transfer wait when any of its hops goes round a corner.
    """
    devices = mesh.devices.reshape(*mesh.devices.shape[: len(axes)], -1)[..., 0].ravel()

    def place(position):
        device = devices[position]
        coordinates = (*getattr(device, "coords", (position,)), getattr(device, "core_on_chip", 0))
        return getattr(device, "slice_index", 0), *coordinates

    order = [position for *_, position in snake(sorted((*place(i), i) for i in range(len(devices))))]
    return Ring(axes, tuple(zip(order, order[1:] + order[:1], strict=True)), tile)


def snake(points: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Reorder sorted grid points so that neighbours in the list are neighbours in the grid."""
    if len(points) == 1 or not points[0]:
        return points
    rows = [(first, [point[1:] for point in row]) for first, row in groupby(points, key=lambda point: point[0])]
    path = [[(first, *point) for point in snake(row)] for first, row in rows]
    return [point for number, row in enumerate(path) for point in (reversed(row) if number % 2 else row)]


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` that keeps its operands' precision and returns at least float32.

    Accelerators round float32 operands unless told not to; bfloat16 operands lose nothing in one pass.
    """
    dtype = jnp.promote_types(a.dtype, b.dtype)
    precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=wide_dtype(dtype))


def paired_cosines(images: Float[Array, "local width"], texts: Float[Array, "local width"]) -> Float[Array, " local"]:
    """The dot product of each image with its own text, in at least float32."""
    return jnp.sum(at_least_float32(images) * at_least_float32(texts), axis=-1)


def masked(logits: Float[Array, "rows columns"], counts: Bool[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """The logits of the pairs that count; the others vanish from sums of exponentials."""
    return jnp.where(counts, logits, _MASKED)


def feature_gradients(
    weigh: Callable,
    images: Tree,
    texts: Tree,
    row: Tree,
    column: Tree,
    captions: Captions | None,
    positive_weight: Tree,
    factor: Tree,
    ring: Ring,
) -> tuple[Float[Array, "local width"], Float[Array, "local width"], Tree]:
    """Gradients of the features, from those of the logits.

    Args:
      weigh: (cosines, pairs, row, column) -> (gradient of the tile's logits, scalars to add up).
      images: this device's image features, (local, width).
      texts: likewise.
      row: what `weigh` needs to know of each image, leading axis `local`.
      column: what it needs to know of each text.
      captions: those of the pairs.
      positive_weight: (local,), the gradient of each pair's own logit.
      factor: of logits on cosines, and the incoming gradient.
      ring: the devices.

    Returns:
      The gradients of images and texts, and the sums of `weigh`'s scalars.
    """

    def visit(d_texts, rows, d_images, block, pairs):
        (images, row), (texts, column) = rows, block
        weights, scalars = weigh(product("id,jd->ij", images, texts), pairs, row, column)
        weights = weights.astype(texts.dtype)
        d_images += product("ij,jd->id", weights, texts)
        d_texts += product("ij,id->jd", weights, images)
        return d_texts, d_images, scalars

    zeros = jnp.zeros_like(at_least_float32(images))
    d_images, d_texts, scalars = rotate(
        visit, add, ring, captions, rows=(images, row), row_state=zeros, block=(texts, column), tally=zeros
    )
    d_images = factor * (d_images + positive_weight[:, None] * texts)
    d_texts = factor * (d_texts + positive_weight[:, None] * images)
    return d_images.astype(images.dtype), d_texts.astype(texts.dtype), scalars


def rotate(
    visit: Callable,
    merge: Callable,
    ring: Ring,
    captions: Captions | None,
    *,
    rows: Tree,
    row_state: Tree,
    block: Tree,
    tally: Tree,
) -> tuple[Tree, Tree, Tree]:
    """Show every device's block to the rows of every device, tile by tile.

    Args:
      visit: (contribution, tile of rows, tile of row_state, block, pairs) -> (contribution, tile of row_state,
        scalars); `pairs` are the tile's `Pairs`.
      merge: combines two tallies.
      ring: the devices' order and the tile.
      captions: those of this device's pairs; None if all captions count as different.
      rows: arrays with leading axis `local` that stay.
      row_state: arrays with leading axis `local` that stay and are updated.
      block: arrays that travel unchanged.
      tally: the empty value of what travels with the block and collects every device's contribution.

    Returns:
      row_state, the tally of the device's own block, and the scalars' sums over all visits.
    """
    shift = partial(jax.lax.ppermute, axis_name=ring.axes, perm=ring.hops)
    local, columns = jax.tree.leaves(rows)[0].shape[0], jax.tree.leaves(block)[0].shape[0]
    count = math.ceil(local / ring.tile)
    size = math.ceil(local / count)
    rows, block = (rows, captions), (block, captions)
    rows, row_state = jax.tree.map(partial(_cut, count=count, size=size), (rows, row_state))

    def hop(carry, _):
        number, row_state, block, collected = carry
        # Sent before the tiles are computed, so that the transfer overlaps with them. The tally therefore travels one
        # hop late: what arrives here was collected from this block before it came.
        next_block, arriving = shift((block, collected))

        def step(carry, tile):
            (first, contribution, row_state), (rows, row_captions) = carry, tile
            texts, column_captions = block
            others = _others(first, (size, columns), local, own=number == 0)
            pairs = compare(row_captions, column_captions, others)
            tile_state = jax.tree.map(lambda leaf: leaf[first // size], row_state)
            contribution, tile_state, scalars = visit(contribution, rows, tile_state, texts, pairs)
            row_state = jax.tree.map(lambda leaf, update: leaf.at[first // size].set(update), row_state, tile_state)
            return (first + size, contribution, row_state), scalars

        (_, contribution, row_state), scalars = jax.lax.scan(step, (0, tally, row_state), rows)
        return (number + 1, row_state, next_block, merge(arriving, contribution)), scalars

    carry = (0, row_state, block, tally)
    (_, row_state, _, collected), scalars = jax.lax.scan(hop, carry, length=len(ring.hops))
    row_state = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:local], row_state)
    return row_state, shift(collected), jax.tree.map(jnp.sum, scalars)


def add(a: Tree, b: Tree) -> Tree:
    """Leaf by leaf: what merges plain sums."""
    return jax.tree.map(jnp.add, a, b)


def _cut(rows: Shaped[Array, "local ..."], count: int, size: int) -> Shaped[Array, "count size ..."]:
    """Cut axis 0 into `count` tiles of `size` rows, the last one filled up with zeros."""
    padding = [(0, count * size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(count, size, *rows.shape[1:])


def _others(
    first: Int[Array, ""], shape: tuple[int, int], local: int, own: Bool[Array, ""]
) -> Bool[Array, "rows columns"]:
    """False for an image and its own text, which lie in the device's own block, and for rows that fill up a tile."""
    row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return ~(own & (row == column) | (row >= local))
