"""What a preparation kept and what it left out, in numbers."""

import json
import os
from collections.abc import Mapping
from typing import Any

from clip_jax.data.damage import REASONS, Damaged
from clip_jax.data.preparation.job import Job
from clip_jax.data.preparation.ranges import Summary
from clip_jax.data.preparation.samples import DROPS

MEANINGS = DROPS | REASONS

FILE = "report.json"


def write(folder: str, job: Job, everything: Summary) -> None:
    """Write the report into a folder.

    Args:
      folder: where it goes.
      job: the preparation.
      everything: what became of all samples.
    """
    damage: tuple[Damaged, ...] = getattr(job.source, "damage", ())
    values = {
        "preparation": job.identity,
        "samples": job.shape.samples,
        "kept": everything.kept,
        "bytes": everything.bytes,
        "left_out": dict(by_reason(everything.left_out)),
        "shown": [
            {"sample": index, "reason": reason, "key": key, "message": message}
            for index, reason, key, message in everything.shown
        ],
        "damaged_files": [{"reason": item.reason, "message": str(item)} for item in damage],
    }
    with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)


def read(folder: str) -> dict[str, Any]:
    """The report in a folder.

    Raises:
      OSError, ValueError: there is none.
    """
    with open(os.path.join(folder, FILE), encoding="utf-8") as file:
        return json.load(file)


def words(left_out: Mapping[str, int]) -> str:
    """Counts by reason: "3 duplicate, 1 image"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in by_reason(left_out))


def by_reason(left_out: Mapping[str, int]) -> list[tuple[str, int]]:
    """The reasons that occur, in the order of `MEANINGS`, with their counts."""
    return [(reason, left_out[reason]) for reason in MEANINGS if left_out.get(reason)]
