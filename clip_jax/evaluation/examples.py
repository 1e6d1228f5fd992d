"""Data sets as features: every host reads and decodes its part, and gets the features of all."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from clip_jax.data.example import Source
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.distributed import agree, of_every_process
from clip_jax.errors import UserError
from clip_jax.evaluation.division import Division, divide_evenly
from clip_jax.evaluation.encoders import Encoder, Variables
from clip_jax.processing import Preprocess


@dataclass(frozen=True)
class EncodedExamples:
    """A data set's examples, in its order, on every host.

    Attributes:
      features: of the images.
      labels: -1 where there is none; or, of every class, whether an image belongs to it.
      captions: of each image.
    """

    features: Float[np.ndarray, "n embed_dim"]
    labels: Int[np.ndarray, "n"] | Bool[np.ndarray, "n classes"]
    captions: list[tuple[str, ...]]


def encode_examples(
    encoder: Encoder,
    variables: Variables,
    source: Source,
    preprocess: Preprocess,
    bar: str = "",
    several_of: int = 0,
    division: Division | None = None,
) -> EncodedExamples:
    """Encode the images of a data set, of which each host reads its part; all hosts must call it together.

    Args:
      encoder: of images.
      variables: its weights.
      source: the data set, the same on every host.
      preprocess: the model's.
      bar: what a progress bar says; "" shows none.
      several_of: the number of classes, if an image can belong to several.
      division: of the examples among the hosts; evenly by default.

    Raises:
      UserError: on every host, where one cannot read an image or has another number of examples than the others.
    """
    check_size(source)
    share = _Share(source, division or divide_evenly(len(source), encoder.partitioner), preprocess, several_of)
    features = encoder.run(variables, share.division, share.batches(), bar)
    agree(share.mistake)
    numbers, labels, captions = (
        list(itertools.chain.from_iterable(parts))
        for parts in zip(*of_every_process([share.numbers, share.labels, share.captions]), strict=True)
    )
    where = np.empty(len(source), np.int64)  # the rows of the examples in what the hosts have read
    where[numbers] = np.arange(len(numbers))
    return EncodedExamples(
        features,
        np.array(labels, bool if several_of else np.int32)[where],
        [tuple(captions[row]) for row in where.tolist()],
    )


@dataclass
class _Share:
    """What this host reads of a data set.

    Attributes:
      numbers: the examples that have been read.
      labels: theirs.
      captions: theirs.
      mistake: what cannot be read.
    """

    source: Source
    division: Division
    preprocess: Preprocess
    several_of: int
    numbers: list[int] = field(default_factory=list)
    labels: list[int] | list[list[bool]] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    mistake: UserError | None = None

    def batches(self) -> Iterator[tuple[UInt8[np.ndarray, "rows side side 3"], bool]]:
        """This host's rows of every batch; from a mistake on they are empty and say so."""
        own = self.division.own_examples
        batches = evaluation_batches(self.source, own, self.preprocess, self.several_of)
        side = self.preprocess.image_resolution
        for numbers in own:
            images = np.zeros((len(numbers), side, side, 3), np.uint8)
            if self.mistake is None:
                try:
                    batch = next(batches)
                    images, filled = batch["image"], numbers >= 0
                    self.numbers += numbers[filled].tolist()
                    self.labels += batch["label"][filled].tolist()
                    self.captions += batch["captions"][filled].tolist()
                except UserError as error:
                    self.mistake = error
            yield images, self.mistake is not None


def check_size(source: Source) -> None:
    """Hosts that see different data would wait for each other, or mix up their examples."""
    sizes = of_every_process(len(source))
    if len(set(sizes)) > 1:
        seen = ", ".join(f"{size} on process {process}" for process, size in enumerate(sizes[:8]))
        raise UserError(f"{source.name} must be the same on every host, but its number of examples is {seen}")
    if not len(source):
        raise UserError(f"{source.name}: expected at least one example, got none")
