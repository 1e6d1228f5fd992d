"""A model's two towers over a mesh: rows in, on one host or several; features out, on every host."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num
from tqdm import tqdm

from clip_jax.evaluation.division import ROWS_PER_DEVICE, Division, divide_evenly
from clip_jax.models import CLIP, normalize
from clip_jax.parallel import Partitioner
from clip_jax.precision import at_least_float32
from clip_jax.processing import Preprocess, Tokenizer, make_tokenizer

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Encoder:
    """A tower, jitted, for any number of rows; the features are NumPy arrays, the same on every host.

    Attributes:
      function: (variables, rows, whether the host of each piece of the batch refuses) -> (features, the same).
      partitioner: of the mesh.
      unit: what a progress bar calls a row.
    """

    function: Callable[[Variables, Array, Array], tuple[Array, Array]]
    partitioner: Partitioner
    unit: str

    def __call__(
        self, variables: Variables, rows: Num[np.ndarray, "n ..."], bar: str = ""
    ) -> Float[np.ndarray, "n embed_dim"]:
        """Encode rows that every host has; `bar` is what a progress bar says, and "" shows none."""
        division = divide_evenly(len(rows), self.partitioner)
        batches = ((_filled(rows, examples), False) for examples in division.own_examples)
        return self.run(variables, division, batches, bar)

    def run(
        self, variables: Variables, division: Division, batches: Iterable[tuple[np.ndarray, bool]], bar: str = ""
    ) -> Float[np.ndarray, "n embed_dim"]:
        """Encode rows of which every host has its part. The devices work on a batch while the next one is made.

        Args:
          variables: the weights.
          division: which rows of which batch this host has.
          batches: its rows of each; and whether it refuses to go on, on which all hosts return what they have so far.
          bar: what a progress bar says; "" shows none.
        """
        begun = (self._begin(variables, division, *batch) for batch in batches)
        count = int((division.examples >= 0).sum())
        features = np.zeros((count, 0), np.float32)
        with tqdm(total=count, desc=bar, unit=self.unit, disable=not bar) as progress:
            for examples, ((values, refused), _) in zip(division.examples, _one_behind(begun), strict=False):
                if np.asarray(refused).any():
                    break
                if not features.size:
                    features = np.empty((count, *values.shape[1:]), values.dtype)
                numbers = examples.reshape(-1)
                features[numbers[numbers >= 0]] = np.asarray(values)[numbers >= 0]
                progress.update(int((numbers >= 0).sum()))
        return features

    def _begin(self, variables: Variables, division: Division, rows: np.ndarray, refused: bool) -> tuple[Array, Array]:
        """Start to encode a batch, of which this host has some rows."""
        _, pieces, size = division.examples.shape
        own = rows.reshape(len(division.own), size, *rows.shape[1:])
        sharding = self.partitioner.batch_sharding

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            return own[division.own.index((index[0].start or 0) // size)]

        on_devices = jax.make_array_from_callback((pieces * size, *rows.shape[1:]), sharding, piece)
        flags = jax.make_array_from_callback((pieces,), sharding, lambda _: np.array([refused]))
        return self.function(variables, on_devices, flags)


@dataclass(frozen=True)
class Encoders:
    """A model's towers, with what makes their inputs.

    Attributes:
      model: whose.
      partitioner: of the mesh.
      preprocess: the model's image preprocessing.
      tokenizer: of the model.
      encode_images: uint8 images (n, R, R, 3) -> unit vectors.
      encode_tokens: int32 tokens (n, context_length) -> unit vectors.
      probe_features: uint8 images (n, R, R, 3) -> what a linear probe sees.
    """

    model: CLIP
    partitioner: Partitioner
    preprocess: Preprocess
    tokenizer: Tokenizer
    encode_images: Encoder
    encode_tokens: Encoder
    probe_features: Encoder

    def images_per_second(self, variables: Variables, most: int) -> float:
        """How fast images are encoded, measured on a batch that is compiled already if `most` images have been encoded.

        Args:
          variables: the weights.
          most: images.
        """
        side, count = self.preprocess.image_resolution, min(most, ROWS_PER_DEVICE * self.partitioner.batch_shards)
        images = np.zeros((count, side, side, 3), np.uint8)
        self.encode_images(variables, images)
        began = time.perf_counter()
        self.encode_images(variables, images)
        return count / (time.perf_counter() - began)


def make_encoders(model: CLIP, partitioner: Partitioner) -> Encoders:
    """The encoders of a model, each compiled once."""
    config = model.config
    preprocess = Preprocess.from_config(config)

    def encode_images(variables: Variables, images: Array) -> Array:
        pixels = preprocess.normalize(images, model.execution.wide_dtype)
        return normalize(model.apply(variables, pixels, method=model.encode_image))

    def encode_tokens(variables: Variables, tokens: Array) -> Array:
        return normalize(model.apply(variables, tokens, method=model.encode_text))

    def probe_features(variables: Variables, images: Array) -> Array:
        pixels = preprocess.normalize(images, model.execution.wide_dtype)
        return at_least_float32(model.apply(variables, pixels, method=model.probe_features))

    return Encoders(
        model,
        partitioner,
        preprocess,
        make_tokenizer(config.text),
        _encoder(encode_images, partitioner, "image"),
        _encoder(encode_tokens, partitioner, "text"),
        _encoder(probe_features, partitioner, "image"),
    )


def _encoder(encode: Callable[[Variables, Array], Array], partitioner: Partitioner, unit: str) -> Encoder:
    def function(variables: Variables, rows: Array, refused: Array) -> tuple[Array, Array]:
        return encode(variables, rows), refused

    return Encoder(partitioner.jit(function, out_shardings=partitioner.replicated), partitioner, unit)


def _filled(rows: np.ndarray, numbers: Int[np.ndarray, "own_rows"]) -> np.ndarray:
    """Some of the rows, and zeros where the number is -1."""
    batch = np.zeros((len(numbers), *rows.shape[1:]), rows.dtype)
    batch[numbers >= 0] = rows[numbers[numbers >= 0]]
    return batch


def _one_behind(begun: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """What has been begun, each only when the next one has been begun too, and with that."""
    return itertools.pairwise(itertools.chain(begun, [None]))
