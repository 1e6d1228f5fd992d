"""What training does to an image before the image tower sees it: a random crop, on request mirrored and recoloured.

The crop is the paper's (section 2.3) or open_clip's, whose parts follow torchvision's transforms of the same names.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from clip_jax.errors import UserError
from clip_jax.options import option
from clip_jax.processing.images import ImageSource, Preprocess, check_not_empty, decode, open_header, to_rgb

CROPS = ("random", "resized", "center")

_TRIES = 10  # of a resized crop to fit into the image, as in torchvision

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Augment:
    """How training varies its images; the defaults are the paper's."""

    crop: str = option(
        "random",
        "random: a square anywhere once the shorter side is resized, as in the paper; resized: a part of random size "
        "and shape, resized to the model's square, as in open_clip; center: what the model sees at inference",
    )
    scale: tuple[float, float] = option((0.9, 1.0), "smallest and largest share of the image's area in a resized crop")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "smallest and largest width / height of a resized crop")
    flip: bool = option(False, "mirror half of the images, at random; not where captions tell left from right")
    color_jitter: tuple[float, float, float, float] = option(
        (0.0, 0.0, 0.0, 0.0),
        "largest change of brightness, contrast and saturation, as a fraction, and of hue, up to 0.5 of its circle",
    )

    def __post_init__(self):
        if self.crop not in CROPS:
            raise UserError(f"augment.crop must be one of {', '.join(CROPS)}; got {self.crop!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"augment.scale must be two numbers above 0 and up to 1, in order; got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UserError(f"augment.ratio must be two numbers above 0, in order; got {self.ratio}")
        *strengths, hue = self.color_jitter
        if not all(0 <= strength < math.inf for strength in strengths) or not 0 <= hue <= 0.5:
            raise UserError(
                "augment.color_jitter must be four numbers of at least 0, the last one (hue) at most 0.5; "
                f"got {self.color_jitter}"
            )

    @property
    def is_random(self) -> bool:
        """Whether an image looks different from one epoch to the next."""
        return self.crop != "center" or self.flip or any(self.color_jitter)

    def __call__(
        self, image: ImageSource, rng: np.random.Generator, preprocess: Preprocess
    ) -> UInt8[np.ndarray, "resolution resolution 3"]:
        """Returns the pixels of one training example.

        Of `rng` are drawn, in this order: the crop; with `flip`, whether to mirror; with any `color_jitter`, the
        order of the four adjustments and then a factor for each. A large JPEG is decoded at a reduced scale where
        the crop keeps enough pixels; the draws do not depend on it.

        Args:
          image: a path, the content of a file or an image, of any size and mode.
          rng: draws everything that is random.
          preprocess: of the model; for a resized crop its resolution and interpolation count.

        Raises:
          UserError: the image cannot be read, is empty or too elongated, or has a mode without RGB equivalent.
        """
        cuts = {"random": _random_crop, "resized": self._resized_crop, "center": _center_crop}
        square = to_rgb(cuts[self.crop](open_header(image), rng, preprocess))
        if self.flip and rng.random() < 0.5:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if any(self.color_jitter):
            square = self._jittered(square, rng)
        return np.asarray(square)

    def _resized_crop(self, image: Image.Image, rng: np.random.Generator, preprocess: Preprocess) -> Image.Image:
        """torchvision's RandomResizedCrop."""
        size, side = image.size, preprocess.image_resolution
        shorter = check_not_empty(size)
        left, top, right, bottom = box = self._draw_box(size, rng)
        image = decode(image, math.ceil(side * shorter / min(right - left, bottom - top)))
        box = [round(edge * new / old) for edge, new, old in zip(box, image.size * 2, size * 2, strict=True)]
        return image.crop(box).resize((side, side), preprocess.filter)

    def _draw_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
        """A part of an image: its area evenly from `scale`, its shape log-evenly from `ratio`, its place evenly.

        After ten that do not fit into the image, it is the largest central one of an admissible shape.
        """
        width, height = size
        for _ in range(_TRIES):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(*map(math.log, self.ratio)))
            part = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < part[0] <= width and 0 < part[1] <= height:
                left, top = (int(rng.integers(whole - own + 1)) for whole, own in zip(size, part, strict=True))
                return left, top, left + part[0], top + part[1]
        least, most = self.ratio
        part = min(width, max(1, round(height * most))), min(height, max(1, round(width / least)))
        left, top = (width - part[0]) // 2, (height - part[1]) // 2
        return left, top, left + part[0], top + part[1]

    def _jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """torchvision's ColorJitter."""
        order = rng.permutation(len(_ADJUSTMENTS))
        *strengths, hue = self.color_jitter
        factors = [rng.uniform(max(0, 1 - strength), 1 + strength) for strength in strengths]
        factors.append(rng.uniform(-hue, hue))
        for number in order:
            if self.color_jitter[number]:
                image = _ADJUSTMENTS[number](image, factors[number])
        return image


def _random_crop(image: Image.Image, rng: np.random.Generator, preprocess: Preprocess) -> Image.Image:
    """A square of the resized image, from anywhere evenly: CLIP's only augmentation (section 2.3 of the paper)."""
    size, side = preprocess.resized_size(image.size), preprocess.image_resolution
    left, top = (int(rng.integers(length - side + 1)) for length in size)
    image = decode(image, min(size))
    # Only the square is resized, a quarter less work for a photograph; its pixels are the same within one level.
    to_stored = [stored / resized for stored, resized in zip(image.size * 2, size * 2, strict=True)]
    box = [edge * scale for edge, scale in zip((left, top, left + side, top + side), to_stored, strict=True)]
    return image.resize((side, side), preprocess.filter, box)


def _center_crop(image: Image.Image, _: np.random.Generator, preprocess: Preprocess) -> Image.Image:
    """As at inference, to the bit; nothing is drawn."""
    return Image.fromarray(preprocess.resize_and_crop(decode(image)))


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def _hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by a part of its circle, in Pillow's steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda level: (level + int(shift * 255)) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_ADJUSTMENTS = (_brightness, _contrast, _saturation, _hue)  # in the order of `color_jitter`
