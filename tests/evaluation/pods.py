"""A tiny model and data set that are evaluated on several meshes and by several processes, and what comes of it."""

import dataclasses
import functools
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.few_shot import few_shot
from clip_jax.evaluation.linear_probe import linear_probe
from clip_jax.evaluation.retrieval import zero_shot_retrieval
from clip_jax.evaluation.zero_shot import zero_shot
from clip_jax.models import CLIP, CLIPConfig, TextConfig, VisionTransformerConfig, variable_shapes
from clip_jax.parallel import MeshConfig, make_partitioner

CONFIG = CLIPConfig(16, VisionTransformerConfig(16, 8, 16, 1, 2, 32), TextConfig(16, 2, 32, 1, context_length=12))
CLASSES = ("red", "green", "blue")
EXAMPLES, TRAIN = 101, 30
CHUNK = 8


class Pictures:
    """Noise of three colours that are easy to tell apart, with one to three captions; counts what is read."""

    name = "pictures"
    class_names = CLASSES

    def __init__(self, count=EXAMPLES, first=0, broken=None):
        self.count, self.first, self.broken = count, first, broken
        self.read = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.broken:
            raise UserError("it is broken")
        number = self.first + index
        pixels = np.random.default_rng(number).integers(0, 120, (20, 24, 3), dtype=np.uint8)
        pixels[..., number % 3] += 120
        captions = tuple(f"{CLASSES[number % 3]} {k} of {number}" for k in range(1 + number % 3))
        return Example(Image.fromarray(pixels), captions, number % 3)


@functools.cache
def variables():
    generator = np.random.default_rng(6)
    return jax.tree.map(lambda leaf: np.asarray(generator.normal(size=leaf.shape), np.float32), variable_shapes(CONFIG))


def encoders(devices):
    return make_encoders(CLIP(CONFIG), make_partitioner(MeshConfig(), devices))


def dataset(count=EXAMPLES, broken=None):
    train = functools.cache(functools.partial(Pictures, TRAIN, first=1000))
    return EvaluationSet("pictures", Pictures(count, broken=broken), CLASSES, ("a {}", "the {} thing"), train=train)


TASKS = (zero_shot, zero_shot_retrieval, linear_probe, few_shot)


@contextmanager
def few_fits():
    """What a linear probe does is little, and chunks of features are so small that each process has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_jax.evaluation.few_shot.SHOTS", (1,))
        patch.setattr("clip_jax.evaluation.few_shot.SEEDS", (0, 1))
        patch.setattr("clip_jax.evaluation.linear_probe.PER_DECADE", 1)
        patch.setattr("clip_jax.evaluation.linear_probe._FIRST_STEP", 2)
        patch.setattr("clip_jax.evaluation.linear_probe._DECADES", 2)
        patch.setattr("clip_jax.evaluation.features.CHUNK", CHUNK)
        yield


def evaluated(own, tasks=TASKS):
    """What comes of tasks, arrays by name; and which images were read for each."""
    found, read = {}, {}
    for task in tasks:
        name, pictures = task.__name__, dataset()
        with few_fits():
            result = task(own, variables(), pictures, progress=False)
        found |= {f"{name}/{key}": np.float64(value) for key, value in result.metrics.items()}
        arrays = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        found |= {f"{name}/{key}": array for key, array in arrays.items() if isinstance(array, np.ndarray)}
        read[name] = {"test": pictures.source.read, "train": pictures.train().read}
    return found, read
