"""The parts of a sample, as they are handed on: images in files of their own, and captions."""

import os
import stat
from collections.abc import Iterable

from clip_jax.data import files
from clip_jax.data.damage import Damaged
from clip_jax.errors import UserError

MAX_BYTES = 2**28  # of a stored image, or of a caption file


def read_file(path: str, reason: str) -> bytes:
    """A small file, whole.

    Args:
      path: of a file here or in a bucket.
      reason: what is damaged where the file is missing: "image" or "caption".

    Raises:
      Damaged: it is missing, no file, or over `MAX_BYTES`, of which no more is read.
    """
    try:
        if files.is_remote(path):
            content = files.read(path, 0, MAX_BYTES + 1)
            size = len(content)
        else:
            status = os.stat(path)
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(reason, f"{path} is not a file")
            content = files.read(path) if size <= MAX_BYTES else b""
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(reason, f"{path} cannot be read: {error}") from error
    if size > MAX_BYTES:
        raise Damaged("too_large", f"{path} has over {MAX_BYTES} bytes")
    return content


def decoded_captions(values: Iterable[bytes | str | None]) -> tuple[str, ...]:
    """Captions as text, without surrounding white space and without those that are empty.

    Raises:
      Damaged: one is not UTF-8 text.
    """
    try:
        texts = [value.decode("utf-8") if isinstance(value, bytes) else value or "" for value in values]
    except UnicodeDecodeError as error:
        raise Damaged("caption", f"the caption is not UTF-8 text (byte {error.start})") from error
    return tuple(text for text in map(str.strip, texts) if text)
