"""What a preparation kept and what it left out, and why: numbers for programs, a page with samples for people."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jinja2

from clip_jax.data.damage import REASONS, Damaged
from clip_jax.data.preparation.job import Job
from clip_jax.data.preparation.ranges import Summary
from clip_jax.data.preparation.samples import DROPS
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image, to_rgb
from clip_jax.processing.thumbnails import thumbnail

JSON, HTML = "report.json", "report.html"

_THUMBNAIL = 96  # pixels
_MEANINGS = DROPS | REASONS

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("clip_jax.data", "preparation"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(folder: str, job: Job, everything: Summary, title: str) -> None:
    """Write both files of a report.

    Args:
      folder: where they go.
      job: the preparation.
      everything: what became of all samples.
      title: heading of the page.
    """
    damage: tuple[Damaged, ...] = getattr(job.source, "damage", ())
    values = {
        "preparation": job.identity,
        "samples": job.shape.samples,
        "kept": everything.kept,
        "bytes": everything.bytes,
        "left_out": dict(_sorted(everything.left_out)),
        "shown": [
            {"sample": index, "reason": reason, "key": key, "message": message}
            for index, reason, key, message in everything.shown
        ],
        "damaged_files": [{"reason": item.reason, "message": str(item)} for item in damage],
    }
    with open(os.path.join(folder, JSON), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
    page = _TEMPLATES.get_template("report.html").render(
        values, title=title, thumbnail=_THUMBNAIL, meanings=_MEANINGS, sections=_sections(job, everything)
    )
    with open(os.path.join(folder, HTML), "w", encoding="utf-8") as file:
        file.write(page)


def read(folder: str) -> dict[str, Any]:
    """The numbers of the report in a folder."""
    with open(os.path.join(folder, JSON), encoding="utf-8") as file:
        return json.load(file)


def words(left_out: Mapping[str, int]) -> str:
    """Counts by reason: "3 duplicate, 1 image"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in _sorted(left_out))


def _sorted(left_out: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(reason, left_out[reason]) for reason in _MEANINGS if left_out.get(reason)]


def _sections(job: Job, everything: Summary) -> list[dict[str, Any]]:
    """One for each reason, with its samples."""
    return [
        {
            "reason": reason,
            "count": count,
            "samples": [
                {"key": key or f"sample {index}", "message": message, "picture": _picture(job, index)}
                for index, why, key, message in everything.shown
                if why == reason
            ],
        }
        for reason, count in _sorted(everything.left_out)
    ]


def _picture(job: Job, index: int) -> str:
    """Of a sample, if it can be decoded at all; else nothing."""
    try:
        return thumbnail(to_rgb(open_image(job.source[index].image)), _THUMBNAIL)
    except (UserError, OSError):
        return ""
