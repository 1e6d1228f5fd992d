"""Image features on disk, a file for each chunk of neighbouring examples.

  CACHE/features/MODEL/CHUNK.npz

CACHE is that of the official weights. MODEL is a digest of the weights and of what the model is; CHUNK is one of the
examples' labels and stored images. So another model, an example that was changed or another order find nothing,
whatever the data set is called. A file is written whole or not at all; a damaged one is replaced.
"""

import hashlib
import io
import json
import logging
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.data.damage import naming
from clip_jax.data.example import Source, where
from clip_jax.digests import digests
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.platform import cache_folder

logger = logging.getLogger(__name__)

VERSION = 1  # of the files; another one where features of the same model and images would be others


@dataclass(frozen=True)
class Features:
    """What a linear probe sees of some examples.

    Attributes:
      values: float32, not normalised (see `CLIP.probe_features`).
      labels: -1 where there is none.
    """

    values: Float[np.ndarray, "n dim"]
    labels: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Bool[np.ndarray, "n"]) -> "Features":
        return Features(self.values[chosen], self.labels[chosen])

    def __add__(self, other: "Features") -> "Features":
        return concatenated([self, other])


def concatenated(parts: list[Features]) -> Features:
    """The examples of several parts, one part after the other."""
    return Features(np.concatenate([part.values for part in parts]), np.concatenate([part.labels for part in parts]))


def model_folder(encoders: Encoders, variables: Variables) -> Path:
    """Where the features of a model are, by all that they depend on but the images."""
    model = encoders.model
    what = {"version": VERSION, "model": model.config.to_dict(), "dtype": model.execution.dtype}
    digest = _sha256(json.dumps({**what, "digests": digests(variables)}, sort_keys=True).encode())
    return cache_folder() / "features" / digest


def chunk_digest(source: Source) -> str:
    """Of the labels and stored images of a source.

    Raises:
      Damaged: an image cannot be read.
    """

    def digest(index: int) -> str:
        with naming(where(source, index)):
            example = source[index]
        image = example.image
        if not isinstance(image, bytes):
            image = f"{image.mode} {image.size}".encode() + image.tobytes()
        return _sha256(f"{example.label} ".encode() + image)

    with ThreadPoolExecutor() as pool:
        return _sha256("".join(pool.map(digest, range(len(source)))).encode())


def read(file: Path, examples: int) -> Features | None:
    """The features in a file; None if there is none, or it is damaged (NumPy checks each array's CRC-32)."""
    try:
        features = from_bytes(file.read_bytes())
        if features.values.ndim != 2 or not len(features.values) == len(features.labels) == examples:
            raise ValueError(f"{features.values.shape} features of {examples} examples")
        return features
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); its features are computed again", file, error)
        return None


def write(file: Path, features: Features) -> None:
    """Keep features, or say why they cannot be kept."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(to_bytes(features))
        part.replace(file)
    except OSError as error:
        logger.warning("cannot keep features in %s (%s); they will be computed again next time", file, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def to_bytes(features: Features) -> bytes:
    """The content of a file."""
    stream = io.BytesIO()
    np.savez(stream, values=features.values, labels=features.labels)
    return stream.getvalue()


def from_bytes(content: bytes) -> Features:
    """The inverse of `to_bytes`; what is no such content raises one of several exceptions."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Features(arrays["values"], arrays["labels"])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
