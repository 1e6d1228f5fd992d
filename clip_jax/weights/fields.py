"""What other formats call the sizes of a tower: one table a tower, read in both directions."""

from collections.abc import Mapping
from typing import Any

# Their field -> ours, and what they take where it is missing.
Table = Mapping[str, tuple[str, int]]


def from_json(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from a configuration of theirs."""
    return {ours: values.get(theirs, default) for theirs, (ours, default) in table.items()}


def to_json(table: Table, tower: Any) -> dict[str, Any]:
    """Inverse of `from_json`, from one of our towers' configurations."""
    return {theirs: getattr(tower, ours) for theirs, (ours, _) in table.items()}
