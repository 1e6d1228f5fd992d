"""The features of a frozen image tower, computed once before the first step instead of anew in every epoch."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from tqdm import tqdm

from clip_jax.data.reader import TrainReader
from clip_jax.distributed import is_first, together
from clip_jax.models import CLIP
from clip_jax.platform import usable_cores
from clip_jax.processing import Preprocess
from clip_jax.training.loop import HostBatch, to_devices
from clip_jax.training.state import Training
from clip_jax.training.step import Batch

logger = logging.getLogger(__name__)


def image_features(
    training: Training, variables: Mapping[str, Any], reader: TrainReader
) -> Float32[np.ndarray, "examples embed_dim"]:
    """The features of all training images, not normalised, by the numbers of the examples.

    Each host reads an equal part of every batch, and gets the features of all: 4 * embed_dim bytes for each image.

    Args:
      training: has the model and the mesh.
      variables: of the model, on the mesh.
      reader: of images that nothing random varies; its batch size is the one of encoding.

    Raises:
      Damaged: an image cannot be read.
    """
    model, partitioner = training.model, training.partitioner
    total, size = int(reader.mixture.starts[-1]), reader.mixture.batch_size

    def encode_rows(variables: Mapping[str, Any], batch: Batch) -> tuple[Array, Array]:
        """The features, and which examples they are of: the mesh decides where in a batch each host has its rows."""
        return pixel_features(model, variables, batch["image"]), batch["number"]

    encode = partitioner.jit(encode_rows, out_shardings=partitioner.replicated)
    share = size // jax.process_count()
    first = share * jax.process_index()
    features = np.empty((total, model.config.embed_dim), np.float32)
    logger.info("computing the features of %d images once: the image tower is frozen", total)
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="clip_jax-data") as pool:
        for start in tqdm(range(0, total, size), desc="features", unit="batch", disable=None if is_first() else True):
            own = np.minimum(np.arange(start + first, start + first + share, dtype=np.int32), total - 1)
            images = together(lambda own=own: np.stack(list(pool.map(reader.pixels, own.tolist()))))
            batch = to_devices({"image": images, "number": own}, partitioner)
            found, numbers = jax.device_get(encode(variables, batch))
            features[numbers] = found.astype(np.float32)
    return features


def pixel_features(
    model: CLIP, variables: Mapping[str, Any], images: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch embed_dim"]:
    """The features of images that come as bytes, without a change of running statistics."""
    pixels = Preprocess.from_config(model.config).normalize(images, model.execution.wide_dtype)
    return model.apply(variables, pixels, method=model.encode_image)


def with_features(
    batches: Iterator[HostBatch], features: Float32[np.ndarray, "examples embed_dim"]
) -> Iterator[HostBatch]:
    """Batches whose `image` is the number of an example, with its features there instead."""
    return ({**batch, "image": features[batch["image"]]} for batch in batches)
