"""Small pictures for HTML pages."""

import base64
import io

from PIL import Image


def thumbnail(image: Image.Image, side: int) -> str:
    """A data URL of the image, scaled so that its longer side has `side` pixels; small ones keep their hard edges."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    buffer = io.BytesIO()
    image.resize(size, resampling).save(buffer, "PNG")
    return data_url(buffer)


def data_url(png: io.BytesIO) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
