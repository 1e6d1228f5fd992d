"""A page about a prepared data set: what was left out and why, with samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.data.example import Source
from clip_jax.data.preparation.report import MEANINGS, by_reason
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image, to_rgb
from clip_jax.reports.page import picture_url, write_page

MOST_FILES = 100  # damaged files that are listed


def write_preparation(path: str | Path, title: str, report: Mapping[str, Any], source: Source) -> None:
    """Write the page.

    Args:
      path: the HTML file.
      title: heading.
      report: the content of report.json.
      source: has the pictures.
    """
    sections = [
        {
            "reason": reason,
            "meaning": MEANINGS[reason],
            "count": count,
            "samples": _samples([item for item in report["shown"] if item["reason"] == reason], source),
        }
        for reason, count in by_reason(report["left_out"])
    ]
    files = report["damaged_files"]
    write_page(
        path,
        "preparation.html",
        title=title,
        report=report,
        sections=sections,
        files=files[:MOST_FILES],
        more_files=max(0, len(files) - MOST_FILES),
    )


def _samples(items: Sequence[Mapping[str, Any]], source: Source) -> list[dict[str, str]]:
    return [
        {
            "key": item["key"] or f"sample {item['sample']}",
            "message": item["message"],
            "picture": _picture(source, item["sample"]),
        }
        for item in items
    ]


def _picture(source: Source, index: int) -> str:
    """Of a sample, if it can be decoded at all; else nothing."""
    try:
        return picture_url(to_rgb(open_image(source[index].image)))
    except (UserError, OSError):
        return ""
