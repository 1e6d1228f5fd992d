"""From a sample as its source has it to a sample as it is stored, or to a reason why it is not."""

import io

from PIL import Image

from clip_jax.data.damage import Damaged
from clip_jax.data.example import Example
from clip_jax.data.preparation.job import Options, Shape
from clip_jax.errors import UserError
from clip_jax.processing.images import check_not_empty, decode, open_header, to_rgb

DROPS = {
    "small": "its shorter side has fewer pixels than min_side",
    "elongated": "it is more elongated than max_aspect",
    "caption_length": "no caption is as long as min_caption and max_caption say",
    "duplicate": "an earlier sample has the same image",
}

MOST_CLASSES = 2**20  # a label beyond is damage: readers of a data set name every class

_KEPT_FORMATS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG begin so: what TFDS decodes everywhere
_QUALITY = 95  # of what is shrunk


class Dropped(Exception):
    """A sample that options leave out.

    Attributes:
      reason: one of `DROPS`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def prepare(example: Example, shape: Shape, options: Options) -> Example:
    """The sample as it is stored, its image as a JPEG or PNG file.

    Args:
      example: the sample.
      shape: what the samples of its source have.
      options: what becomes of it.

    Raises:
      Damaged: its image, captions or label cannot be used.
      Dropped: options leave it out.
    """
    captions = prepare_captions(example, shape, options)
    label = _label(example, shape) if shape.labels else None
    image = _stored(example.image, options)
    return Example(image, captions, label, example.key.encode(errors="backslashreplace").decode())


def prepare_captions(example: Example, shape: Shape, options: Options) -> tuple[str, ...]:
    """The captions of a length that is wanted; none of a source without captions.

    Raises:
      Damaged: there is none, or one is no text.
      Dropped: none has such a length.
    """
    if not shape.captions:
        return ()
    if not example.captions:
        raise Damaged("caption", "expected at least one caption, got none")
    lengths = [len(caption) for caption in example.captions]
    most = options.max_caption or max(lengths)
    captions = [c for c in example.captions if options.min_caption <= len(c) <= most]
    if not captions:
        raise Dropped("caption_length", f"its captions have {', '.join(map(str, lengths[:10]))} characters")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise Damaged("caption", f"a caption cannot be written as UTF-8 text: {error.reason}") from error
    return tuple(captions)


def open_checked(stored: bytes | Image.Image, options: Options) -> Image.Image:
    """An image that is not decoded yet, if it has a size that is wanted.

    Raises:
      Damaged: it is none.
      Dropped: it has another size.
    """
    try:
        image = open_header(stored)
        shorter = check_not_empty(image.size)
    except UserError as error:
        raise Damaged("image", str(error)) from error
    size = f"it has {image.width} x {image.height} pixels"
    if shorter < options.min_side:
        raise Dropped("small", size)
    if options.max_aspect and max(image.size) > options.max_aspect * shorter:
        raise Dropped("elongated", size)
    return image


def decode_rgb(image: Image.Image, shorter: int = 0) -> Image.Image:
    """Decode what `open_checked` returned.

    Args:
      image: the image.
      shorter: resize it so that its shorter side has this many pixels; 0 keeps its size.

    Raises:
      Damaged: it cannot be decoded.
    """
    size = image.size
    try:
        image = to_rgb(decode(image, shorter))
    except UserError as error:
        raise Damaged("image", str(error)) from error
    if not shorter:
        return image
    width, height = (max(1, round(side * shorter / min(size))) for side in size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _stored(stored: bytes | Image.Image, options: Options) -> bytes:
    """The file of an image: as it is, unless it has to be another one."""
    image = open_checked(stored, options)
    shrinks = 0 < options.max_side < min(image.size)
    rgb = decode_rgb(image, options.max_side if shrinks else 0)  # also where the file stays: it may be damaged
    if shrinks or options.quality:
        return _encoded(rgb, "JPEG", quality=options.quality or _QUALITY)
    if isinstance(stored, bytes) and stored.startswith(_KEPT_FORMATS):
        return stored
    return _encoded(rgb, "PNG")


def _encoded(image: Image.Image, image_format: str, **settings: int) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, image_format, **settings)
    except OSError as error:
        raise Damaged(
            "image", f"{image.width} x {image.height} pixels do not fit into a {image_format} file"
        ) from error
    return buffer.getvalue()


def _label(example: Example, shape: Shape) -> int:
    most = len(shape.class_names) or MOST_CLASSES
    if example.label is None or not 0 <= example.label < most:
        raise Damaged("unreadable", f"expected a label from 0 to {most - 1}, got {example.label}")
    return example.label
