"""Data that goes bad on request: pictures of noise, some of them black, and a model's input that makes NaN of black."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.data.order import sample_index
from clip_jax.data.sources import SOURCES, SourceConfig
from clip_jax.options import option
from clip_jax.processing import Preprocess


@dataclass(frozen=True, kw_only=True)
class DarkConfig(SourceConfig):
    """Pictures of noise, some of them black."""

    size: int = option(help="how many")
    black: tuple[int, ...] = option((), "which of them are black")

    def open(self, access):
        return Dark(self.size, self.black)


class Dark:
    name = "dark"

    def __init__(self, size, black):
        self._size, self._black = size, set(black)

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(1, 256, (40, 40, 3), dtype=np.uint8)
        return Example(Image.fromarray(pixels * (index not in self._black)), (f"number {index}",), key=f"{index}.png")


def black_images_are_nan(monkeypatch):
    """Let normalisation on the device make NaN of black images."""
    normalize = Preprocess.normalize

    def poisoned(self, images, dtype):
        black = (images == 0).all(axis=(1, 2, 3), keepdims=True)
        return jnp.where(black, jnp.nan, normalize(self, images, dtype))

    monkeypatch.setattr(Preprocess, "normalize", poisoned)
    monkeypatch.setitem(SOURCES, "dark", DarkConfig)


def dark_data(seed, size, positions):
    """The `data` of a config whose samples at some positions of the order are black."""
    return {"dark": {"size": size, "black": tuple(sample_index(seed, np.array(positions), size).tolist())}}
