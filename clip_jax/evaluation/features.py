"""Image features of a data set, kept on disk: an evaluation that was interrupted, or is repeated, goes on from there.

  CACHE/features/MODEL/CHUNK.npz    features and labels of up to 4,096 neighbouring examples

CACHE is that of the official weights. MODEL is a digest of the weights and of what the model is; CHUNK is one of the
examples' labels and stored images. So another model, an example that was changed or another order find nothing,
whatever the data set is called. Images whose features are there are read, not decoded. A chunk is written whole or not
at all; a damaged one is replaced.
"""

import hashlib
import json
import logging
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from clip_jax.data.damage import naming
from clip_jax.data.example import Example, Source, where
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.digests import digests
from clip_jax.evaluation.zero_shot import BATCH_SIZE, Encoders, Variables
from clip_jax.platform import cache_folder

logger = logging.getLogger(__name__)

VERSION = 1  # of the chunks; another one where features of the same model and images would be others
CHUNK = 4096


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


def extract(encoders: Encoders, variables: Variables, source: Source, progress: bool = True) -> Features:
    """The features of every example of a source, in its order, from the cache as far as it has them.

    Args:
      encoders: of the model.
      variables: its weights.
      source: images with labels.
      progress: show a bar.

    Raises:
      UserError: an image that cannot be read.
    """
    folder = cache_folder() / "features" / model_digest(encoders, variables)
    parts = []
    with tqdm(total=len(source), desc=f"{source.name} features", unit="image", disable=not progress) as bar:
        for start in range(0, len(source), CHUNK):
            part = _Part(source, range(start, min(start + CHUNK, len(source))))
            parts.append(_chunk(encoders, variables, part, folder))
            bar.update(len(part))
    return concatenated(parts)


def model_digest(encoders: Encoders, variables: Variables) -> str:
    """Of all that a feature depends on but the image."""
    model = encoders.model
    what = {"version": VERSION, "model": model.config.to_dict(), "dtype": model.execution.dtype}
    return _sha256(json.dumps({**what, "digests": digests(variables)}, sort_keys=True).encode())


@dataclass(frozen=True)
class _Part:
    """Some neighbouring examples of a source, as a source."""

    source: Source
    indices: range

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]

    def where(self, index: int) -> str:
        return where(self.source, self.indices[index])

    def digest(self) -> str:
        """Of labels and stored images."""
        with ThreadPoolExecutor() as pool:
            return _sha256("".join(pool.map(self._digest, range(len(self)))).encode())

    def _digest(self, index: int) -> str:
        with naming(self.where(index)):
            example = self[index]
        image = example.image
        if not isinstance(image, bytes):
            image = f"{image.mode} {image.size}".encode() + image.tobytes()
        return _sha256(f"{example.label} ".encode() + image)


def _chunk(encoders: Encoders, variables: Variables, part: _Part, folder: Path) -> Features:
    file = folder / f"{part.digest()}.npz"
    kept = _read(file, len(part))
    if _on_every_host(kept is not None):
        return kept
    features = _encode(encoders, variables, part)
    _write(file, features)
    return features


def _encode(encoders: Encoders, variables: Variables, part: _Part) -> Features:
    parts = []
    for batch in evaluation_batches(part, BATCH_SIZE, encoders.preprocess):
        values = encoders.probe_features(variables, batch["image"])
        parts.append(Features(values, batch["label"])[batch["mask"]])
    return concatenated(parts)


def _on_every_host(found: bool) -> bool:
    """Hosts encode together, so that one which lacks a chunk needs the others."""
    return found if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(found)).all())


def _read(file: Path, examples: int) -> Features | None:
    """The features in a file; None if there is none, or it is damaged (NumPy checks each array's CRC-32)."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            features = Features(arrays["values"], arrays["labels"])
        if features.values.ndim != 2 or not len(features.values) == len(features.labels) == examples:
            raise ValueError(f"{features.values.shape} features of {examples} examples")
        return features
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); its features are computed again", file, error)
        return None


def _write(file: Path, features: Features) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.savez(stream, values=features.values, labels=features.labels)
        part.replace(file)
    except OSError as error:
        logger.warning("cannot keep features in %s (%s); they will be computed again next time", file, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
