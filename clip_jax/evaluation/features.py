"""Image features of a data set, kept on disk: an evaluation that was interrupted, or is repeated, goes on from there.

  CACHE/features/MODEL/CHUNK.npz    features and labels of up to 4,096 neighbouring examples

MODEL is a digest of the weights and of what the model is (see `kept.py`); CHUNK is one of the examples' labels and
stored images. So another model, an example that was changed or another order find nothing, whatever the data set is
called. Images whose features are there are read, not decoded.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from clip_jax.data.damage import naming
from clip_jax.data.example import Example, Source, where
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.evaluation.kept import Arrays, kept, model_digest, sha256
from clip_jax.evaluation.zero_shot import BATCH_SIZE, Encoders, Variables

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
    model = model_digest(encoders, variables)
    parts = []
    with tqdm(total=len(source), desc=f"{source.name} features", unit="image", disable=not progress) as bar:
        for start in range(0, len(source), CHUNK):
            part = _Part(source, range(start, min(start + CHUNK, len(source))))
            parts.append(_chunk(encoders, variables, part, model))
            bar.update(len(part))
    return concatenated(parts)


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
            return sha256("".join(pool.map(self._digest, range(len(self)))).encode())

    def _digest(self, index: int) -> str:
        with naming(self.where(index)):
            example = self[index]
        image = example.image
        if not isinstance(image, bytes):
            image = f"{image.mode} {image.size}".encode() + image.tobytes()
        return sha256(f"{example.label} ".encode() + image)


def _chunk(encoders: Encoders, variables: Variables, part: _Part, model: str) -> Features:
    def fits(arrays: Arrays) -> bool:
        values, labels = arrays["values"], arrays["labels"]
        return values.ndim == 2 and len(values) == len(labels) == len(part)

    def compute() -> Arrays:
        features = _encode(encoders, variables, part)
        return {"values": features.values, "labels": features.labels}

    return Features(**kept(f"features/{model}/{part.digest()}", fits, compute))


def _encode(encoders: Encoders, variables: Variables, part: _Part) -> Features:
    parts = []
    for batch in evaluation_batches(part, BATCH_SIZE, encoders.preprocess):
        values = encoders.probe_features(variables, batch["image"])
        parts.append(Features(values, batch["label"])[batch["mask"]])
    return concatenated(parts)
