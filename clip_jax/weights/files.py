"""Small JSON files of strangers, and files and folders that appear only when they are complete."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError

MAX_JSON_BYTES = 16 * 2**20  # a tokenizer's vocabulary takes three


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: no such file, too large for a configuration, or not a JSON object.
    """
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"expected a small JSON file at {path}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a folder, which takes the final name only when complete.

    Raises:
      UserError: `path` exists already, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another name")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()
