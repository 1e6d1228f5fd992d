"""Tables of a tower's fields, read in both directions: our field -> (another library's name, its default)."""

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, tuple[str, int]]


def from_json(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of our dataclass, from what the other library's configuration says or takes by default."""
    return {ours: values.get(theirs, default) for ours, (theirs, default) in fields.items()}


def to_json(fields: Fields, tower: Any) -> dict[str, Any]:
    """The same fields of our dataclass, by the other library's names."""
    return {theirs: getattr(tower, ours) for ours, (theirs, _) in fields.items()}
