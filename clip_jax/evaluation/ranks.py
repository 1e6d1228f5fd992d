"""What is reported of retrieval, from features: recall at 1, 5 and 10 and the median rank, both ways."""

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.metrics import check_finite

Features = Float[np.ndarray, "n embed_dim"]

_KS = (1, 5, 10)
_BLOCK = 2**22  # cosines that exist at a time
_TIE = 1e-9  # far above what the order of a float64 sum changes, far below what float32 features tell apart


def retrieval_metrics(
    images: Float[np.ndarray, "images embed_dim"],
    texts: Float[np.ndarray, "texts embed_dim"],
    image_of_text: Int[np.ndarray, "texts"],
) -> dict[str, float]:
    """Recall and median rank, under CLIP_benchmark's names; as in the paper's table 13.

    For `image_retrieval_…` each caption is a query, and its image must be among the k best. For `text_retrieval_…` each
    image is a query, and any of its captions must be.

    Args:
      images: unit vectors.
      texts: unit vectors.
      image_of_text: the number of the image that each text describes.

    Returns:
      `image_retrieval_recall@K` and `text_retrieval_recall@K` for K of 1, 5 and 10, but where there are fewer than K to
      choose from; `image_retrieval_median_rank` and `text_retrieval_median_rank`, counted from 1.

    Raises:
      UserError: a feature is not finite, or an image has no text.
    """
    numbers = np.arange(len(images))
    directions = {
        "image": (own_ranks(texts, images, image_of_text, numbers), len(images)),
        "text": (own_ranks(images, texts, numbers, image_of_text), len(texts)),
    }
    metrics = {}
    for name, (ranks, candidates) in directions.items():
        metrics |= {f"{name}_retrieval_recall@{k}": float(np.mean(ranks < k)) for k in _KS if k <= candidates}
        metrics[f"{name}_retrieval_median_rank"] = float(np.median(ranks)) + 1
    return metrics


def own_ranks(
    queries: Float[np.ndarray, "q embed_dim"],
    candidates: Float[np.ndarray, "c embed_dim"],
    query_groups: Int[np.ndarray, "q"],
    candidate_groups: Int[np.ndarray, "c"],
) -> Int[np.ndarray, "q"]:
    """How many candidates of other groups lie at least as near to each query as the nearest one of its own group.

    Ties count against the query: the result does not depend on any order, and a model that has collapsed to one vector
    finds nothing. Cosines are computed in float64, a block of queries at a time.

    Args:
      queries: unit vectors.
      candidates: unit vectors.
      query_groups: what each query belongs to.
      candidate_groups: what each candidate belongs to.

    Raises:
      UserError: a feature is not finite, or a query has no candidate of its own.
    """
    check_finite(queries, "features")
    check_finite(candidates, "features")
    columns = candidates.astype(np.float64).T
    rows = max(1, _BLOCK // len(candidates))
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        cosines = queries[block].astype(np.float64) @ columns
        row, column = np.nonzero(query_groups[block, None] == candidate_groups[None])
        own, nearest = cosines[row, column], np.full(len(cosines), -np.inf)
        np.maximum.at(nearest, row, own)
        if np.isneginf(nearest).any():
            raise UserError("retrieval needs at least one caption for each image, and an image for each caption")
        limit = nearest - _TIE
        own_ones = np.bincount(row[own >= limit[row]], minlength=len(cosines))
        ranks[block] = np.count_nonzero(cosines >= limit[:, None], axis=1) - own_ones
    return ranks
