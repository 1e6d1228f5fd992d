"""The part of the page about retrieval: some queries and what they find."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clip_jax.evaluation.ranks import own_ranks
from clip_jax.evaluation.retrieval import RetrievalResult
from clip_jax.reports.samples import spread, thumbnail

FOUND = 5  # shown for each query
QUERIES = 3  # shown of those that find their own first, and as many of the others
TRIED = 200  # queries, evenly over all, from which those are taken


def retrieval_section(result: RetrievalResult) -> dict[str, Any]:
    """What the template shows of one data set: images that captions find, and captions that images find."""
    images, texts = result.image_features, result.text_features
    numbers = np.arange(len(images))
    return {
        "name": result.dataset.name,
        "from_text": [
            {
                "rank": rank + 1,
                "caption": _caption(result, query),
                "own": thumbnail(result.dataset, result.image_of_text[query]) if rank >= FOUND else "",
                "found": [
                    (thumbnail(result.dataset, image), cosine, image == result.image_of_text[query])
                    for image, cosine in _nearest(texts[query], images)
                ],
            }
            for query, rank in _queries(texts, images, result.image_of_text, numbers)
        ],
        "from_image": [
            {
                "rank": rank + 1,
                "picture": thumbnail(result.dataset, query),
                "own": result.dataset.source[query].captions[0] if rank >= FOUND else "",
                "found": [
                    (_caption(result, text), cosine, result.image_of_text[text] == query)
                    for text, cosine in _nearest(images[query], texts)
                ],
            }
            for query, rank in _queries(images, texts, numbers, result.image_of_text)
        ],
    }


def _queries(
    queries: Float[np.ndarray, "q embed_dim"],
    candidates: Float[np.ndarray, "c embed_dim"],
    query_groups: Int[np.ndarray, "q"],
    candidate_groups: Int[np.ndarray, "c"],
) -> list[tuple[int, int]]:
    """Some queries with the rank of what they should find, from 0; those that find something else first come first."""
    tried = spread(np.arange(len(queries)), TRIED)
    ranks = own_ranks(queries[tried], candidates, query_groups[tried], candidate_groups)
    chosen = [spread(np.flatnonzero(these), QUERIES) for these in (ranks > 0, ranks == 0)]
    return [(int(tried[place]), int(ranks[place])) for place in np.concatenate(chosen)]


def _nearest(
    query: Float[np.ndarray, "embed_dim"], candidates: Float[np.ndarray, "c embed_dim"]
) -> list[tuple[int, float]]:
    """The nearest candidates, with their cosines."""
    cosines = candidates.astype(np.float64) @ query.astype(np.float64)
    return [(int(index), float(cosines[index])) for index in np.argsort(-cosines, kind="stable")[:FOUND]]


def _caption(result: RetrievalResult, text: int) -> str:
    """The captions of an image follow one another, in its own order."""
    image = int(result.image_of_text[text])
    own = np.flatnonzero(result.image_of_text == image)
    return result.dataset.source[image].captions[int(np.searchsorted(own, text))]
