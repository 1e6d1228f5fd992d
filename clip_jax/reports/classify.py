"""A page with images and the labels that fit them best."""

from pathlib import Path

from clip_jax.evaluation.classify import Classification
from clip_jax.processing.images import open_image
from clip_jax.reports.page import picture_url, write_page


def write_classification(path: str | Path, title: str, result: Classification) -> None:
    """Write the page; its folder is created."""
    images = [
        {"picture": picture_url(open_image(image)), "path": image, "best": result.best(number)}
        for number, image in enumerate(result.images)
    ]
    write_page(path, "classify.html", title=title, images=images)
