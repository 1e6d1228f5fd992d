"""Captions that a batch holds more than once: which pairs of an image and a text then count as what.

In a folder of two classes every caption is that of half the batch. By the plain losses each of its images is a negative
of the others' captions, which describe it just as well. Two ways out:

- "positives": an image's targets are all texts that equal its own, spread evenly, and a text's targets are the images
  of these: UniCL's loss (arXiv 2204.03610, section 3.2) with captions for labels. A cross entropy then does not fall
  below log n where a caption is there n times.
- "ignored": such pairs are left out, as if the other image were not in the batch.

The sigmoid loss needs one of them: each pair asks for itself. Not so the softmax loss: while equal captions have equal
features, what its negatives push away is what the n captions pull back, and "positives" has the same value and the
same gradients as "negatives". It differs once captions are equal by label rather than by letter.
"""

from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

# What the other images of a caption can be to it, and it to them.
REPEATED_CAPTIONS = ("negatives", "positives", "ignored")


@flax.struct.dataclass
class Captions:
    """The captions of a batch, to be told apart, and what is done where they are equal.

    Attributes:
      fingerprints: of each caption, uint32 (batch, 2); equal captions have equal ones.
      repeated: "positives" or "ignored".
    """

    fingerprints: Any
    repeated: str = flax.struct.field(pytree_node=False)


class Pairs(NamedTuple):
    """What the pairs of some images (rows) and some texts (columns) are.

    Attributes:
      counts: False for those to leave out, an image and its own text among them: their logits are added apart.
      positive: which of them are targets besides an image's own text; None if captions are not compared for that.
    """

    counts: Bool[Array, "rows columns"]
    positive: Bool[Array, "rows columns"] | None


def captions_of(tokens: Int[Array, "batch length"], repeated: str) -> Captions | None:
    """What the losses need to know of a batch's captions; None if repeated ones are negatives like all others.

    Args:
      tokens: of the captions; captions are equal if all their tokens are.
      repeated: one of `REPEATED_CAPTIONS`.
    """
    return None if repeated == "negatives" else Captions(fingerprints(tokens), repeated)


def fingerprints(tokens: Int[Array, "batch length"]) -> UInt32[Array, "batch 2"]:
    """Two independent 32-bit hashes of each row.

    They travel the ring in place of the rows: 8 bytes instead of 308, and two comparisons a pair instead of 77, where
    the logit costs hundreds of multiply-adds. Each adds up one scrambled number per position and token. Rows that
    differ in one token differ in both hashes (scrambling is one-to-one); other rows agree in both with a chance of
    2^-64, so even among a million different captions two are confused in one batch of 37 million.
    """
    words = tokens.astype(jnp.uint32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.uint32)
    keys = [_scramble(positions + jnp.uint32(seed)) for seed in (0x243F6A88, 0x85A308D3)]
    return jnp.stack([_scramble(words ^ key[None, :]).sum(axis=1, dtype=jnp.uint32) for key in keys], axis=1)


def compare(rows: Captions | None, columns: Captions | None, others: Bool[Array, "rows columns"]) -> Pairs:
    """What pairs are, from the captions of their images and texts.

    Args:
      rows: the captions of the images; None if all captions count as different.
      columns: those that the texts are; None likewise.
      others: False for an image and its own text, and for what fills up a tile.
    """
    if rows is None or columns is None:
        return Pairs(others, None)
    equal = others
    for row, column in zip(rows.fingerprints.T, columns.fingerprints.T, strict=True):
        equal &= row[:, None] == column[None, :]
    return Pairs(others, equal) if rows.repeated == "positives" else Pairs(others & ~equal, None)


def less_targets(
    probabilities: Float[Array, "rows columns"], pairs: Pairs, share: Float[Array, " rows"]
) -> Float[Array, "rows columns"]:
    """A cross entropy's gradient at logits: softmax probabilities minus targets, `share` at each positive of a row."""
    return probabilities if pairs.positive is None else probabilities - pairs.positive * share[:, None]


def _scramble(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """MurmurHash3's finaliser: one-to-one, every bit of the result depends on every bit of `x`."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16
