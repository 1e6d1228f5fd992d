"""JSON objects that carry their own SHA-256, so that no change in them goes unnoticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from clip_jax.errors import DamagedFile

SEAL = "sha256"
MAX_BYTES = 16 * 2**20


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the SHA-256 of all of them."""
    return {**values, SEAL: _seal(values)}


def read_object(file: epath.Path) -> dict[str, Any]:
    """The JSON object in a file of at most 16 MiB.

    Raises:
      DamagedFile: there is none.
    """
    try:
        if file.stat().length > MAX_BYTES:
            raise DamagedFile(f"{file} is damaged: it is larger than {MAX_BYTES // 2**20} MiB")
        values = json.loads(file.read_text())
    except DamagedFile:
        raise
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{file} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise DamagedFile(f"{file} is damaged: expected an object, got {str(values)[:50]}")
    return values


def check_seal(values: Mapping[str, Any], file: epath.Path) -> None:
    """See that what was read from a file has the SHA-256 that it states.

    Raises:
      DamagedFile: it has not.
    """
    if values.get(SEAL) != _seal(values):
        raise DamagedFile(f"{file} is damaged: it does not have the SHA-256 that it states")


def _seal(values: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
