"""A page with the samples of one training batch, because people look at their data."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clip_jax.data.reader import Sample
from clip_jax.reports.page import THUMBNAIL, picture_url, write_page

MOST_SAMPLES = 256


def write_batch(path: str | Path, title: str, first_position: int, samples: Sequence[Sample], replaced: str) -> None:
    """Write the page.

    Args:
      path: the HTML file; its folder is created.
      title: heading.
      first_position: of the batch in the global order.
      samples: in the order of the batch; the first 256 are shown.
      replaced: the damaged samples that were replaced, in words; "" for none.
    """
    shown = [
        {
            "picture": picture_url(Image.fromarray(sample.image), min(2 * THUMBNAIL, sample.image.shape[0])),
            "caption": sample.caption,
            "position": first_position + row,
            "source": sample.source,
            "index": sample.index,
            "key": sample.key,
        }
        for row, sample in enumerate(samples[:MOST_SAMPLES])
    ]
    left_out = max(0, len(samples) - MOST_SAMPLES)
    write_page(path, "batch.html", title=title, samples=shown, replaced=replaced, left_out=left_out)
