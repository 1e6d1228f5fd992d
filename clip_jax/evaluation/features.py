"""Image features of a data set, kept on disk: an evaluation that was interrupted, or is repeated, goes on from there.

Images whose features are there are read, not decoded. Each host has chunks of its own, which it alone reads,
digests and keeps; a round is one chunk of each, which are encoded together unless all of them are kept.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from clip_jax.data.example import Example, Source, where
from clip_jax.distributed import bytes_of_every_process, of_every_process, together
from clip_jax.evaluation import feature_files
from clip_jax.evaluation.division import divide, readers, rows_per_device
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.examples import check_size, encode_examples
from clip_jax.evaluation.feature_files import Features, concatenated
from clip_jax.parallel import Partitioner

CHUNK = 1024  # neighbouring examples that are kept in one file


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
    folder = feature_files.model_folder(encoders, variables)
    parts: dict[range, Features] = {}
    with tqdm(total=len(source), desc=f"{source.name} features", unit="image", disable=not progress) as bar:
        for chunks in _rounds(len(source), encoders.partitioner):
            own = chunks.get(jax.process_index(), range(0))
            file = folder / f"{together(lambda own=own: feature_files.chunk_digest(_Part(source, own)))}.npz"
            kept = feature_files.read(file, len(own)) if own else _NOTHING
            if all(of_every_process(kept is not None)):
                parts |= _of_every_process(chunks, kept)
            else:
                parts |= _encode(encoders, variables, source, chunks)
                if kept is None:
                    feature_files.write(file, parts[own])
            bar.update(sum(map(len, chunks.values())))
    return concatenated([parts[chunk] for chunk in sorted(parts, key=lambda chunk: chunk.start)])


_NOTHING = Features(np.zeros((0, 0), np.float32), np.zeros(0, np.int32))  # of a host without a chunk


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


def _rounds(count: int, partitioner: Partitioner) -> Iterator[dict[int, range]]:
    """Of each process that still has one, its next chunk."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    processes = list(readers(partitioner))
    bounds = np.arange(len(processes) + 1) * len(chunks) // len(processes)
    own = [chunks[first:end] for first, end in itertools.pairwise(bounds.tolist())]
    for each in itertools.zip_longest(*own):
        yield {process: chunk for process, chunk in zip(processes, each, strict=True) if chunk}


def _encode(
    encoders: Encoders, variables: Variables, source: Source, chunks: Mapping[int, range]
) -> dict[range, Features]:
    """The features of a round's chunks, which each host reads its own of."""
    part = _Part(source, list(itertools.chain.from_iterable(chunks.values())))
    lengths = [len(chunks.get(process, ())) for process in readers(encoders.partitioner)]
    division = divide(lengths, rows_per_device(len(source)), encoders.partitioner)
    encoded = encode_examples(encoders.probe_features, variables, part, encoders.preprocess, division=division)
    ends = np.cumsum([len(chunk) for chunk in chunks.values()])[:-1]
    features = map(Features, np.split(encoded.features, ends), np.split(encoded.labels, ends))
    return dict(zip(chunks.values(), features, strict=True))


def _of_every_process(chunks: Mapping[int, range], kept: Features) -> dict[range, Features]:
    """The features of a round's chunks, of which each host has its own."""
    contents = bytes_of_every_process(feature_files.to_bytes(kept))
    return {chunk: feature_files.from_bytes(contents[process]) for process, chunk in chunks.items()}
