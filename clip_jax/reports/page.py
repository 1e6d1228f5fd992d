"""Self-contained HTML pages: pictures are inside them, so that the one file can be sent to anyone."""

import base64
import io
from typing import Any

import jinja2
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

THUMBNAIL = 96  # pixels

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("clip_jax", "reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: epath.PathLike, template: str, **values: Any) -> None:
    """Fill in a template of this folder and write it; the file's folder is created."""
    page = _TEMPLATES.get_template(template).render(thumbnail=THUMBNAIL, **values)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def picture_url(image: Image.Image, side: int = THUMBNAIL) -> str:
    """An image whose longer side is `side` pixels, as an address that holds it; enlarged, it keeps its pixels."""
    image = image.convert("RGB")
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    buffer = io.BytesIO()
    if scale > 1:
        image.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
        return _data_url(buffer, "png")
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return _data_url(buffer, "jpeg")


def figure_url(figure: Figure) -> str:
    """A figure, as an address that holds it."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return _data_url(buffer, "png")


def _data_url(buffer: io.BytesIO, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"
