"""Small models and batches that several tests share."""

from typing import Any

import jax
import numpy as np

from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig, variable_shapes

TEXT = TextConfig(width=64, heads=4, mlp_width=256, layers=2, context_length=16, vocab_size=512)
VIT = CLIPConfig(32, VisionTransformerConfig(32, 8, 64, 2, 4, 256), TEXT)
RESNET = CLIPConfig(32, ResNetConfig(32, 8, (1, 2, 1, 1), 4), TEXT)
END_OF_TEXT = TEXT.vocab_size - 1


def images(config: CLIPConfig, batch: int, seed: int = 0) -> np.ndarray:
    """uint8 (batch, R, R, 3)."""
    side = config.vision.image_resolution
    return np.random.default_rng(seed).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)


def tokens(config: CLIPConfig, batch: int, seed: int = 0) -> np.ndarray:
    """int32 (batch, context_length): random words, one end-of-text, zeros after it."""
    generator = np.random.default_rng(seed)
    end_of_text, length = config.text.vocab_size - 1, config.text.context_length
    rows = generator.integers(1, end_of_text, (batch, length), dtype=np.int32)
    ends = generator.integers(2, length, batch)
    rows[np.arange(batch), ends] = end_of_text
    rows[np.arange(length)[None] > ends[:, None]] = 0
    return rows


def batch(config: CLIPConfig, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What a train step takes."""
    return {"image": images(config, size, seed), "text": tokens(config, size, seed)}


def variables(config: CLIPConfig, seed: int = 0) -> Any:
    """float32 NumPy arrays of a model's shapes, positive so that they serve as variances too; nothing is compiled."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(np.abs(generator.normal(0, 0.1, leaf.shape)), np.float32), variable_shapes(config)
    )


def telling_variables(config: CLIPConfig, seed: int = 0) -> Any:
    """The same as a model that tells images apart: normal, and around 1 where they are gains."""
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        return np.asarray(generator.normal(path[-1].key == "scale", 0.05, leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(config))
