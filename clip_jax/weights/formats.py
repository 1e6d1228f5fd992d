"""From whatever holds a CLIP model to (config, variables), and back into any of the four formats."""

from pathlib import Path
from typing import Any

from etils import epath

from clip_jax import model_folder
from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.weights import download, huggingface, open_clip, openai

WRITERS = {
    "jax": model_folder.write,
    "openai": openai.write,
    "open_clip": open_clip.write,
    "huggingface": huggingface.write,
}
_READERS_WITH_CONFIG = {"jax": model_folder.read, "open_clip": open_clip.read, "huggingface": huggingface.read}


def load_variables(
    source: str | Path, *, download_root: str | Path | None = None, activation: str | None = None
) -> tuple[CLIPConfig, Any]:
    """The model that `source` holds: (config, variables as float32 NumPy arrays).

    Args:
      source: an official name ("ViT-B/32"), a `.pt`, `.bin` or `.safetensors` file, a folder of transformers or of
        open_clip, or a converted checkpoint.
      download_root: the cache of official files; see `download.cache_folder` for the default.
      activation: "quick_gelu" or "gelu", for a bare file that does not say which.

    Raises:
      UserError: there is no such thing, it is damaged, or it is not a CLIP of this architecture.
    """
    form, path = locate(source, download_root)
    if form == "openai":
        return openai.read(path, activation)
    if activation is not None:
        raise UserError(f"{path} comes with a configuration that says its activation; leave the activation out")
    return _READERS_WITH_CONFIG[form](path)


def locate(source: str | Path, download_root: str | Path | None = None) -> tuple[str, Path | epath.Path]:
    """The format of `source` (a key of `WRITERS`) and where it lies; official files are downloaded.

    The path is the folder of a converted checkpoint or of transformers, and the file of weights otherwise.

    Raises:
      UserError: nothing is there, or nothing that is known.
    """
    if download.is_official(str(source)):
        return "openai", download.fetch(str(source), download_root)
    if folder := model_folder.find(source):
        return "jax", folder
    path = Path(source)
    if not path.exists():
        known = ", ".join(download.available_models())
        raise UserError(f"{str(source)!r} is neither a file nor a folder nor one of {known}")
    folder = path if path.is_dir() else path.parent
    if huggingface.is_folder(folder) and (path == folder or path.name in huggingface.WEIGHT_FILES):
        return "huggingface", folder
    if open_clip.is_folder(folder):
        return "open_clip", open_clip.weights_file(folder) if path == folder else path
    if path != folder:
        return "openai", path
    raise UserError(
        f"{path} is no folder of weights: expected {model_folder.DESCRIPTION} (a model folder), config.json with "
        f"{huggingface.WEIGHT_FILES[0]} (transformers) or {open_clip.CONFIG_FILE} (open_clip)"
    )


def save(target: str | Path, config: CLIPConfig, variables: Any, to: str) -> None:
    """Write a model in one of the formats of `WRITERS`: a file for "openai", a folder for the others.

    Raises:
      UserError: there is no such format, it cannot express the model, or `target` exists or cannot be written.
    """
    if to not in WRITERS:
        raise UserError(f"cannot write the format {to!r}; expected one of {', '.join(WRITERS)}")
    WRITERS[to](Path(target), config, variables)
