"""From an image to the pixels that the image tower reads, equal to OpenAI's pipeline bit by bit.

That pipeline is torchvision's Resize (bicubic), CenterCrop, conversion to RGB, ToTensor and Normalize, in this
order: a palette or transparent image is resized in its own mode. The arithmetic of all five is repeated here.
The orientation that EXIF data asks for is not applied, because theirs does not either. Models of others differ in how
they resize; what they have is in their `CLIPConfig`.
"""

import io
import os
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from numpy.typing import DTypeLike
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.models.config import OPENAI_IMAGE_MEAN, OPENAI_IMAGE_STD, CLIPConfig

# Pillow's own limit for images that are surely not a decompression bomb: 256 MiB as RGB.
MAX_PIXELS = 2**28 // 3

# Pillow reads dozens of formats, some by old code or external programs; these are what image data sets hold.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class Preprocess:
    """A model's image preprocessing (OpenAI's `_transform` in `clip/clip.py`).

    Attributes:
      image_resolution: side of the square that the model reads, in pixels.
      mean: per channel, subtracted from values in [0, 1].
      std: per channel, divided by.
      interpolation: Pillow's name of a filter, in lower case.
      resize: "shortest" resizes the shorter side, "squash" both sides.
      resize_to: the length that these sides get; 0 for `image_resolution`.
    """

    image_resolution: int
    mean: tuple[float, float, float] = OPENAI_IMAGE_MEAN
    std: tuple[float, float, float] = OPENAI_IMAGE_STD
    interpolation: str = "bicubic"
    resize: str = "shortest"
    resize_to: int = 0

    @classmethod
    def from_config(cls, config: CLIPConfig) -> "Preprocess":
        """The preprocessing that a model was trained with."""
        return cls(
            config.vision.image_resolution,
            config.image_mean,
            config.image_std,
            config.image_interpolation,
            config.image_resize,
            config.image_resize_to,
        )

    def __call__(self, image: Image.Image) -> Float32[np.ndarray, "resolution resolution 3"]:
        """Returns the input of the image tower for one image."""
        return self.normalize(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> UInt8[np.ndarray, "resolution resolution 3"]:
        """Resize the image and take the centre.

        Raises:
          UserError: the image is empty, too elongated or of a mode that has no RGB equivalent.
        """
        resized = self._resized(image)
        # round() is half to even, as in torchvision. Nothing is ever padded: no side is shorter than the crop.
        left, top = (round((side - self.image_resolution) / 2) for side in resized.size)
        return _crop(resized, left, top, self.image_resolution)

    def resize_and_crop_randomly(
        self, image: Image.Image, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "resolution resolution 3"]:
        """Resize the image and take a random square: CLIP's only augmentation (section 2.3 of the paper).

        Args:
          image: of any size and mode.
          rng: draws the place, evenly.

        Raises:
          UserError: as `resize_and_crop`.
        """
        resized = self._resized(image)
        left, top = (int(rng.integers(side - self.image_resolution + 1)) for side in resized.size)
        return _crop(resized, left, top, self.image_resolution)

    def normalize(
        self, images: UInt8[np.ndarray | Array, "*batch 3"], dtype: DTypeLike = np.float32
    ) -> Float[np.ndarray | Array, "*batch 3"]:
        """Returns (images / 255 - mean) / std, computed in `dtype`.

        A NumPy array gives torchvision's result in float32 to the last bit. A JAX array, traced or not, gives it within
        1e-6, because XLA divides by multiplying with the reciprocal.
        """
        channels = (1,) * (images.ndim - 1) + (3,)
        mean, std = (np.asarray(values, dtype).reshape(channels) for values in (self.mean, self.std))
        return (images.astype(dtype) / 255 - mean) / std

    def _resized(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        if shorter < 1:
            raise UserError(f"expected an image with pixels, got one of {image.width} x {image.height}")
        side = self.resize_to or self.image_resolution
        width, height = (side if self.resize == "squash" else int(side * old / shorter) for old in image.size)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"expected an image less elongated than {image.width} x {image.height}, which is {width} x {height} "
                f"when its shorter side is resized, over {MAX_PIXELS} pixels: crop it or leave it out"
            )
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """Open and decode an image that nobody vouches for.

    The size is read from the header, and refused before anything is decoded. Of an animation, the first frame
    counts. EXIF orientation is not applied, as in OpenAI's pipeline.

    Args:
      source: a path, or the content of a file; a picture that is decoded already is returned as it is.

    Returns:
      The decoded image, in the file's own mode.

    Raises:
      UserError: the file is missing, truncated, corrupt, of none of `FORMATS` or over `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return source
    name = "image bytes" if isinstance(source, bytes) else os.fspath(source)
    too_large = f"{name}: expected an image of at most {MAX_PIXELS} pixels, got {{}}: resize it or leave it out"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(too_large.format(f"{image.width} x {image.height}"))
            image.load()
            return image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(too_large.format(error)) from error
    except Exception as error:  # a decoder fails on corrupt data in whatever way it likes
        expected = f"expected a readable image ({', '.join(FORMATS)})"
        raise UserError(f"{name}: {expected}, got {type(error).__name__}: {error}: mend or remove it") from error


def _crop(image: Image.Image, left: int, top: int, side: int) -> UInt8[np.ndarray, "side side 3"]:
    cropped = image.crop((left, top, left + side, top + side))
    cropped.info.pop("transparency", None)  # it changes no RGB value, but Pillow warns that it gets lost
    try:
        return np.asarray(cropped.convert("RGB"))
    except ValueError as error:
        raise UserError(f"expected an image that converts to RGB, got mode {image.mode}: {error}") from error
