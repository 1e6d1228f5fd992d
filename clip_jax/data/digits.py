"""`digits`: the 1,797 handwritten digits that scikit-learn ships (Alpaydin and Kaynak, 1998, UCI repository)."""

import functools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.errors import UserError

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RESOLUTION = 32
_TEMPLATES = (
    "a photo of the digit {}", "a photo of the number {}", "a handwritten {}", "a handwritten digit {}",
    "the digit {}", "the number {}", "a scan of a handwritten {}", "a picture of the number {}",
    "the number {} in somebody's handwriting", "this is the digit {}", "{}", "the figure {} in white on black",
)  # fmt: skip


class Digits:
    """The digits, as 32 × 32 images with captions. A fixed fifth of each class is the test split."""

    class_names = CLASS_NAMES

    def __init__(self, split: str = "train"):
        if split not in ("train", "test"):
            raise UserError(f"digits has the splits train and test, got {split!r}")
        self.name = f"digits/{split}"
        images, labels = _load()
        is_test = _every_fifth_of_each_class(labels)
        chosen = is_test if split == "test" else ~is_test
        self._images = [Image.fromarray(image) for image in images[chosen]]
        self._labels = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        label = self._labels[index]
        return Example(self._images[index], _captions(label), label)


@functools.cache
def _captions(label: int) -> tuple[str, ...]:
    return tuple(frame.format(name) for frame in _TEMPLATES for name in (CLASS_NAMES[label], str(label)))


@functools.cache
def _load() -> tuple[UInt8[np.ndarray, "1797 32 32 3"], np.ndarray]:
    """All images, enlarged from 8 × 8 grey values in 0 … 16, and their labels."""
    from sklearn.datasets import load_digits  # a second of imports that only this source pays

    grey, labels = load_digits(return_X_y=True)
    small = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (RESOLUTION, RESOLUTION)
    images = [Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC).convert("RGB") for digit in small]
    return np.stack(images), labels


def _every_fifth_of_each_class(labels: np.ndarray) -> np.ndarray:
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    return is_test
