"""From an image to the pixels that the image tower reads, equal to OpenAI's pipeline bit by bit.

That pipeline is torchvision's Resize (bicubic), CenterCrop, conversion to RGB, ToTensor and Normalize, in this
order: a palette or transparent image is resized in its own mode. The arithmetic of all five is repeated here.
The orientation that EXIF data asks for is not applied, because theirs does not either. Models of others differ in how
they resize; what they have is in their `CLIPConfig`.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
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

# What is decoded at a reduced scale has at least this many pixels for each one of the resized image. Pictures of hard
# edges, of 1/f noise and of fringes, all with noise on top, then differ from those decoded in full by a PSNR of 42, 37
# and 33 dB at least, about what JPEG of quality 90 loses; without a margin by 31, 27 and 23 dB. A margin of 2 (46, 42
# and 38 dB) would leave out 1024 x 768 for R = 224, whose decoding and resizing take 5.7 ms instead of 9.5.
_MARGIN = 1.5

ImageSource = str | os.PathLike[str] | bytes | Image.Image


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
        resized = image.resize(self.resized_size(image.size), self.filter)
        # round() is half to even, as in torchvision. Nothing is ever padded: no side is shorter than the crop.
        left, top = (round((side - self.image_resolution) / 2) for side in resized.size)
        return np.asarray(to_rgb(resized.crop((left, top, left + self.image_resolution, top + self.image_resolution))))

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

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that an image of some width and height gets before it is cropped.

        Raises:
          UserError: the image is empty or too elongated.
        """
        shorter = check_not_empty(size)
        side = self.resize_to or self.image_resolution
        width, height = (side if self.resize == "squash" else int(side * old / shorter) for old in size)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"expected an image less elongated than {size[0]} x {size[1]}, which is {width} x {height} "
                f"when its shorter side is resized, over {MAX_PIXELS} pixels: crop it or leave it out"
            )
        return width, height

    @property
    def filter(self) -> Image.Resampling:
        """What Pillow resizes with."""
        return Image.Resampling[self.interpolation.upper()]


def open_image(source: ImageSource) -> Image.Image:
    """Open and decode an image that nobody vouches for.

    The size is read from the header, and refused before anything is decoded. Of an animation, the first frame
    counts. EXIF orientation is not applied, as in OpenAI's pipeline.

    Args:
      source: a path, the content of a file, or an image, which is returned as it is.

    Returns:
      The decoded image, in the file's own mode.

    Raises:
      UserError: the file is missing, truncated, corrupt, of none of `FORMATS` or over `MAX_PIXELS` pixels.
    """
    return decode(open_header(source))


def open_header(source: ImageSource) -> Image.Image:
    """`open_image` without decoding, for whoever needs the size first; `decode` does the rest and closes the file."""
    name = source if isinstance(source, str | os.PathLike) else ""
    with _named_errors(name):
        if isinstance(source, Image.Image):
            source.load()
            return source
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            image.close()
            raise UserError(_too_large(name, f"{image.width} x {image.height}"))
        return image


def decode(image: Image.Image, resized_to: int = 0) -> Image.Image:
    """Decode what `open_header` returned.

    Args:
      image: changed in place.
      resized_to: how long the shorter side is going to be, in training. A JPEG that is several times as large is
        decoded at 1/2, 1/4 or 1/8 of its size, which is faster and gives almost the same pixels. 0 decodes exactly.

    Raises:
      UserError: the file is truncated or corrupt.
    """
    with _named_errors(getattr(image, "filename", "")), image:
        if resized_to:
            enough = math.ceil(_MARGIN * resized_to)
            image.draft(None, (enough, enough))  # does nothing for other formats, or to an image that is decoded
        image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB.

    Args:
      image: loses its transparency.

    Raises:
      UserError: its mode has no RGB equivalent.
    """
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # it changes no RGB value, but Pillow warns that it gets lost
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"expected an image that converts to RGB, got mode {image.mode}: {error}") from error


def check_not_empty(size: tuple[int, int]) -> int:
    """The length of an image's shorter side, which must have pixels."""
    if min(size) < 1:
        raise UserError(f"expected an image with pixels, got one of {size[0]} x {size[1]}")
    return min(size)


@contextmanager
def _named_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong with a file becomes a UserError that begins with its name, "" for bytes."""
    try:
        yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(_too_large(name, error)) from error
    except Exception as error:  # a decoder fails on corrupt data in whatever way it likes
        expected = f"expected a readable image ({', '.join(FORMATS)})"
        got = f"{type(error).__name__}: {error}"
        raise UserError(f"{_shown(name)}: {expected}, got {got}: mend or remove it") from error


def _too_large(name: str | os.PathLike[str], got: object) -> str:
    return f"{_shown(name)}: expected an image of at most {MAX_PIXELS} pixels, got {got}: resize it or leave it out"


def _shown(name: str | os.PathLike[str]) -> str:
    return os.fspath(name) or "image bytes"
