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

    @property
    def starts(self) -> Int64[np.ndarray, "starts"]:
        """The number of each source's first example, if those of all are counted through; then how many there are."""
        return np.cumsum([0, *map(len, self.sources)])

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
      image: uint8, cropped and augmented; or the number of the example among those of all sources.
      caption: the one that was drawn, or the name of the class.
      target: tokens of the caption, or the number of the class.
    """

    source: str
    index: int
    key: str
    image: UInt8[np.ndarray, "side side 3"] | Int32[np.ndarray, ""]
    caption: str
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
      by_number: whether the number of an example stands in for its image, which is then not decoded.
    """

    mixture: Mixture
    preprocess: Preprocess
    target: Target
    augment: Augment
    skip: bool = False
    by_number: bool = False

    def empty_images(self, size: int, memory: memoryview | None = None, offset: int = 0) -> np.ndarray:
        """Room for the images of so many samples, in `memory` if that is given."""
        side = self.preprocess.image_resolution
        shape, dtype = ((size,), np.int32) if self.by_number else ((size, side, side, 3), np.uint8)
        return np.ndarray(shape, dtype, memory, offset)

    def read(
        self,
        positions: Int64[np.ndarray, "n"],
        images: UInt8[np.ndarray, "n side side 3"] | Int32[np.ndarray, "n"],
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
            yield self._sample(position, number, index, damage)

    def pixels(self, number: int) -> UInt8[np.ndarray, "side side 3"]:
        """The image of an example by its number, where nothing about the images is random.

        Raises:
          Damaged: it cannot be read.
        """
        which = int(np.searchsorted(self.mixture.starts, number, side="right")) - 1
        source, index = self.mixture.sources[which], number - int(self.mixture.starts[which])
        with naming(where(source, index)):
            example = source[index]
            with of_example(example.key), image_damage():
                return self.augment(example.image, sample_generator(self.mixture.seed, 0), self.preprocess)

    def _sample(self, position: int, number: int, index: int, damage: Counter[str]) -> Sample:
        source = self.mixture.sources[number]
        for attempt in range(_ATTEMPTS):
            try:
                with naming(where(source, index)):
                    example = source[index]
                    generator = sample_generator(self.mixture.seed, position)
                    image = self._image(number, index, example, generator)
                    return Sample(source.name, index, example.key, image, *self._target(source, example, generator))
            except Damaged as error:
                if not self.skip or attempt == _ATTEMPTS - 1:
                    raise
                damage[error.reason] += 1
                index = replacement_index(self.mixture.seed, position, attempt, len(source))

    def _image(
        self, number: int, index: int, example: Example, generator: np.random.Generator
    ) -> UInt8[np.ndarray, "side side 3"] | Int32[np.ndarray, ""]:
        if self.by_number:
            return np.array(self.mixture.starts[number] + index, np.int32)
        with of_example(example.key), image_damage():
            return self.augment(example.image, generator, self.preprocess)

    def _target(
        self, source: Source, example: Example, generator: np.random.Generator
    ) -> tuple[str, Int32[np.ndarray, "*shape"]]:
        """The caption that is drawn, and what stands in the batch for it."""
        with of_example(example.key):
            words = self.target.words(source, example)
            word = words[generator.integers(len(words))]
            return word, self.target.numbers(word)
