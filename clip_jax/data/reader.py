"""Positions of the global order in, pixels and tokens or labels out: a pure function, whoever calls it, and where."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from clip_jax.data.damage import Damaged, image_damage, naming, of_example
from clip_jax.data.example import Example, Source, where
from clip_jax.data.order import mixture_index, replacement_index, sample_generator, sample_index, windowed_index
from clip_jax.data.targets import Target
from clip_jax.processing import Augment, Preprocess

_ATTEMPTS = 100  # stand-ins for one position, before a source counts as broken altogether


@dataclass(frozen=True)
class Mixture:
    """What a training run reads, and in which order.

    Attributes:
      sources: the data sets to mix.
      weights: their relative weights.
      seed: fixes the order, the crops and the choice among several captions.
      batch_size: of all hosts together.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    seed: int
    batch_size: int

    def locate(self, positions: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Which source each position reads, and which of its examples."""
        numbers, inside = mixture_index(positions, self.weights)
        indices = np.empty_like(positions)
        for number in np.unique(numbers):
            here = numbers == number
            indices[here] = self._order(int(number), inside[here])
        return numbers, indices

    def _order(self, number: int, position: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        source = self.sources[number]
        windows = getattr(source, "windows", None)
        if windows is None:
            return sample_index(self.seed, position, len(source))
        share = self.weights[number] / sum(self.weights)
        return windowed_index(self.seed, position, len(source), windows, round(share * self.batch_size))


@dataclass(frozen=True)
class Sample:
    """What training sees of one example.

    Attributes:
      source: the data set's name.
      index: of the example in its data set.
      key: what the data set calls it.
      caption: the one that was drawn, or the name of the class.
      image: uint8, cropped and augmented.
      target: tokens of the caption, or the number of the class.
    """

    source: str
    index: int
    key: str
    caption: str
    image: UInt8[np.ndarray, "side side 3"]
    target: Int32[np.ndarray, "*shape"]


@dataclass(frozen=True)
class TrainReader:
    """Reads, decodes, crops and tokenises.

    Attributes:
      mixture: what is read.
      preprocess: the model's.
      target: what is read besides the images.
      augment: crops the images, and whatever else varies them.
      skip: whether a damaged sample is replaced by another one, which its position decides; else it is an error.
    """

    mixture: Mixture
    preprocess: Preprocess
    target: Target
    augment: Augment
    skip: bool = False

    def read(
        self,
        positions: Int64[np.ndarray, "n"],
        images: UInt8[np.ndarray, "n side side 3"],
        targets: Int32[np.ndarray, "n *shape"],
    ) -> Counter[str]:
        """Write the samples of some positions into arrays.

        Returns:
          the damaged samples that were replaced, counted by reason.

        Raises:
          Damaged: a sample is damaged, unless it is skipped.
        """
        damage = Counter()
        for row, sample in enumerate(self.samples(positions, damage)):
            images[row], targets[row] = sample.image, sample.target
        return damage

    def samples(self, positions: Int64[np.ndarray, "n"], damage: Counter[str]) -> Iterator[Sample]:
        """The samples of some positions, in their order; those that were replaced are counted in `damage`.

        Raises:
          Damaged: a sample is damaged, unless it is skipped.
        """
        numbers, indices = self.mixture.locate(positions)
        for position, number, index in zip(positions.tolist(), numbers.tolist(), indices.tolist(), strict=True):
            yield self._sample(position, self.mixture.sources[number], index, damage)

    def _sample(self, position: int, source: Source, index: int, damage: Counter[str]) -> Sample:
        for attempt in range(_ATTEMPTS):
            try:
                with naming(where(source, index)):
                    example = source[index]
                    arrays = self._arrays(source, example, sample_generator(self.mixture.seed, position))
                    return Sample(source.name, index, example.key, *arrays)
            except Damaged as error:
                if not self.skip or attempt == _ATTEMPTS - 1:
                    raise
                damage[error.reason] += 1
                index = replacement_index(self.mixture.seed, position, attempt, len(source))

    def _arrays(
        self, source: Source, example: Example, generator: np.random.Generator
    ) -> tuple[str, UInt8[np.ndarray, "side side 3"], Int32[np.ndarray, "*shape"]]:
        """The caption that is drawn, the pixels and the target."""
        with of_example(example.key):
            with image_damage():
                image = self.augment(example.image, generator, self.preprocess)
            words = self.target.words(source, example)
            word = words[generator.integers(len(words))]
            return word, image, self.target.numbers(word)
