"""Image features of a data set, kept on disk: an evaluation that was interrupted, or is repeated, goes on from there.

  CACHE/features/MODEL/CHUNK.npz    features and labels of up to 1,024 neighbouring examples

MODEL is a digest of the weights and of what the model is (see `kept.py`); CHUNK is one of the examples' labels and
stored images. So another model, an example that was changed or another order find nothing, whatever the data set is
called. Images whose features are there are read, not decoded.

Each host has chunks of its own, which it alone reads, digests and keeps. A round is one chunk of each host; they are
encoded together unless all of them are kept.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from clip_jax.data.damage import naming
from clip_jax.data.example import Example, Source, where
from clip_jax.distributed import of_every_process, together
from clip_jax.evaluation.division import divide, readers, rows_per_device
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.examples import check_size, encode_examples
from clip_jax.evaluation.kept import Arrays, arrays_of_every_process, model_digest, read, sha256, write
from clip_jax.parallel import Partitioner

CHUNK = 1024


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
      source: images with labels, the same on every host.
      progress: show a bar.

    Raises:
      UserError: an image that cannot be read, on this host or another one.
    """
    check_size(source)
    model = model_digest(encoders, variables)
    parts: dict[range, Features] = {}
    with tqdm(total=len(source), desc=f"{source.name} features", unit="image", disable=not progress) as bar:
        for chunks in _rounds(len(source), encoders.partitioner):
            parts |= _round(encoders, variables, source, chunks, model)
            bar.update(sum(map(len, chunks.values())))
    return concatenated([parts[chunk] for chunk in sorted(parts, key=lambda chunk: chunk.start)])


def _rounds(count: int, partitioner: Partitioner) -> Iterator[dict[int, range]]:
    """Of each process that still has one, its next chunk."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    processes = list(readers(partitioner))
    bounds = np.arange(len(processes) + 1) * len(chunks) // len(processes)
    own = [chunks[first:end] for first, end in itertools.pairwise(bounds.tolist())]
    for each in itertools.zip_longest(*own):
        yield {process: chunk for process, chunk in zip(processes, each, strict=True) if chunk}


def _round(
    encoders: Encoders, variables: Variables, source: Source, chunks: Mapping[int, range], model: str
) -> dict[range, Features]:
    """The features of a round's chunks, on every host."""
    own = chunks.get(jax.process_index(), range(0))
    name = f"features/{model}/{together(_Part(source, own).digest)}"

    def fits(arrays: Arrays) -> bool:
        values, labels = arrays["values"], arrays["labels"]
        return values.ndim == 2 and len(values) == len(labels) == len(own)

    kept = read(name, fits) if own else {}
    if all(of_every_process(kept is not None)):
        arrays = arrays_of_every_process(kept)
        return {chunk: Features(**arrays[process]) for process, chunk in chunks.items()}
    features = _encode(encoders, variables, source, chunks)
    if kept is None:
        write(name, {"values": features[own].values, "labels": features[own].labels})
    return features


def _encode(
    encoders: Encoders, variables: Variables, source: Source, chunks: Mapping[int, range]
) -> dict[range, Features]:
    """The features of a round's chunks, of which each host reads its own."""
    part = _Part(source, list(itertools.chain.from_iterable(chunks.values())))
    lengths = [len(chunks.get(process, ())) for process in readers(encoders.partitioner)]
    division = divide(lengths, rows_per_device(len(source)), encoders.partitioner)
    encoded = encode_examples(encoders.probe_features, variables, part, encoders.preprocess, division=division)
    ends = np.cumsum([len(chunk) for chunk in chunks.values()])[:-1]
    features = map(Features, np.split(encoded.features, ends), np.split(encoded.labels, ends))
    return dict(zip(chunks.values(), features, strict=True))


@dataclass(frozen=True)
class _Part:
    """Some examples of a source, as a source."""

    source: Source
    indices: Sequence[int]

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
