"""Arrays that are kept on disk, under names that say what they depend on, so that they are computed once.

  CACHE/features/MODEL/CHUNK.npz         see `features.py`
  CACHE/classifiers/MODEL/PROMPTS.npz    see `classifiers.py`

CACHE is that of the official weights. MODEL is a digest of the weights and of what the model is. A file is written
whole or not at all; one that is damaged, or was written under another name, is replaced.
"""

import hashlib
import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from clip_jax.digests import digests
from clip_jax.distributed import bytes_of_every_process, of_every_process
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.platform import cache_folder

logger = logging.getLogger(__name__)

VERSION = 2  # of the files; another one where the arrays of the same model and input would be others
Arrays = dict[str, np.ndarray]


def sha256(content: bytes) -> str:
    """A digest that names files."""
    return hashlib.sha256(content).hexdigest()[:32]


def model_digest(encoders: Encoders, variables: Variables) -> str:
    """Of all that an output depends on but the input: architecture, image processing, compute dtype, weights."""
    model = encoders.model
    what = {"version": VERSION, "model": model.config.to_dict(), "dtype": model.execution.dtype}
    return sha256(json.dumps({**what, "digests": digests(variables)}, sort_keys=True).encode())


def kept(name: str, fits: Callable[[Arrays], bool], compute: Callable[[], Arrays]) -> Arrays:
    """The arrays that are kept under a name; if there are none, they are computed now and kept.

    Hosts compute together, so that one which lacks them needs the others. All hosts call this together.

    Args:
      name: KIND/MODEL/INPUT, the last two digests.
      fits: whether arrays have the names and shapes that they must have, and are worth keeping.
      compute: makes them.
    """
    arrays = read(name, fits)
    if all(of_every_process(arrays is not None)):
        return arrays
    arrays = compute()
    if fits(arrays):
        write(name, arrays)
    return arrays


def arrays_of_every_process(arrays: Arrays) -> list[Arrays]:
    """What each process has, in their order; all processes must call this at the same place."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return [dict(np.load(io.BytesIO(content))) for content in bytes_of_every_process(stream.getvalue())]


def read(name: str, fits: Callable[[Arrays], bool]) -> Arrays | None:
    """This host's arrays of a name; None if it has none, or they are damaged (NumPy checks each array's CRC-32)."""
    file = _file(name)
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = dict(content)
        if str(arrays.pop("name")) != name:
            raise ValueError("it was written under another name")
        if not fits(arrays):
            raise ValueError(", ".join(f"{key} {array.shape}" for key, array in arrays.items()))
        return arrays
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); what it held is computed again", file, error)
        return None


def write(name: str, arrays: Arrays) -> None:
    """Keep arrays on this host, or say why they cannot be kept."""
    file = _file(name)
    part = file.with_name(f"{file.name}.{jax.process_index()}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.savez(stream, name=np.array(name), **arrays)
        part.replace(file)
    except OSError as error:
        logger.warning("cannot keep %s (%s); it will be computed again next time", file, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _file(name: str) -> Path:
    return cache_folder() / f"{name}.npz"
