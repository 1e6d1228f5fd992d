"""From whatever holds a CLIP model to (config, variables), and back into any of the four formats."""

import difflib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax import model_folder
from clip_jax.errors import UserError
from clip_jax.models import OPENAI_MODELS, CLIPConfig
from clip_jax.weights import download, hub, huggingface, open_clip, openai

logger = logging.getLogger(__name__)

WRITERS = {
    "jax": model_folder.write,
    "openai": openai.write,
    "open_clip": open_clip.write,
    "huggingface": huggingface.write,
}
_READERS_WITH_CONFIG = {"jax": model_folder.read, "open_clip": open_clip.read, "huggingface": huggingface.read}


def load_variables(
    source: epath.PathLike,
    *,
    download_root: str | Path | None = None,
    activation: str | None = None,
    model_config: str | Path | None = None,
) -> tuple[CLIPConfig, Any]:
    """The model that `source` holds: (config, variables as float32 NumPy arrays).

    Args:
      source: an official name ("ViT-B/32"), a `.pt`, `.bin` or `.safetensors` file, a folder of transformers or of
        open_clip, a model folder, a workdir or a step of one (with "@ema" for its average), or a name on the hub
        ("ORG/NAME" or "hf-hub:ORG/NAME").
      download_root: the cache of official files; see `platform.cache_folder` for the default.
      activation: "quick_gelu" or "gelu", for a bare file that does not say which.
      model_config: one of open_clip's `model_configs/NAME.json`, for a bare file whose tensors do not show what the
        model is; it says the activation too.

    Raises:
      UserError: there is no such thing, it is damaged, or it is not a CLIP of this architecture.
    """
    form, path = locate(source, download_root)
    if form == "openai" and model_config is None:
        return openai.read(path, activation)
    if form == "openai":
        return open_clip.read(path, Path(model_config), activation)
    if activation is not None or model_config is not None:
        raise UserError(f"{path} comes with its own configuration; leave the activation and the model_config out")
    return _READERS_WITH_CONFIG[form](path)


def architecture(source: epath.PathLike) -> CLIPConfig:
    """What the model that `source` holds is; no weights are read where a name or a description says it.

    Raises:
      UserError: as `load_variables`.
    """
    if download.is_official(str(source)):
        return OPENAI_MODELS[str(source)]
    form, path = locate(source)
    return model_folder.read_config(path) if form == "jax" else load_variables(source)[0]


def head_classes(source: epath.PathLike) -> tuple[str, ...]:
    """The classes of the head of the model that `source` holds; no weights are read, since only our format has heads.

    Raises:
      UserError: there is no such model.
    """
    if download.is_official(str(source)):
        return ()
    form, path = locate(source)
    return model_folder.read_config(path).classes if form == "jax" else ()


def locate(source: epath.PathLike, download_root: str | Path | None = None) -> tuple[str, Path | epath.Path]:
    """The format of `source` (a key of `WRITERS`) and where it lies; official files and the hub's are downloaded.

    The path is a model folder or one of transformers, and the file of weights otherwise.

    Raises:
      UserError: nothing is there, or nothing that is known.
    """
    if download.is_official(str(source)):
        return "openai", download.fetch(str(source), download_root)
    folder = model_folder.find(source)
    if folder is None and not Path(source).exists():
        source = _fetched(str(source))
        folder = model_folder.find(source)
    if folder is not None:
        return "jax", folder
    path = Path(source)
    return _locate_folder(path) if path.is_dir() else _locate_file(path)


def _fetched(source: str) -> Path:
    """The folder of a model on the hub, unless `source` rather looks like something else misspelt."""
    official = {name.casefold(): name for name in download.available_models()}
    near = [official[name] for name in difflib.get_close_matches(source.casefold(), official, n=2, cutoff=0.8)]
    if near:
        raise UserError(f"{source!r} is neither a file nor a folder; did you mean {' or '.join(near)}?")
    if not hub.is_name(source):
        raise UserError(
            f"{source!r} is neither a file nor a folder, nor an official name (clip_jax.available_models()), nor a "
            "name on the hub (ORG/NAME)"
        )
    return hub.fetch(source)


def _locate_folder(folder: Path) -> tuple[str, Path]:
    # Some folders hold the model twice; open_clip's configuration leaves less to be assumed.
    if open_clip.is_folder(folder):
        return "open_clip", open_clip.weights_file(folder)
    if huggingface.is_folder(folder):
        return "huggingface", folder
    raise UserError(
        f"{folder} is no folder of weights: expected {model_folder.DESCRIPTION} (a model folder), config.json with "
        f"{huggingface.WEIGHT_FILES[0]} (transformers) or {open_clip.CONFIG_FILE} with {open_clip.WEIGHT_FILES[0]}"
    )


def _locate_file(path: Path) -> tuple[str, Path]:
    if path.name in huggingface.WEIGHT_FILES and huggingface.is_folder(path.parent):
        return "huggingface", path.parent
    return "open_clip" if (path.parent / open_clip.CONFIG_FILE).is_file() else "openai", path


def save(target: str | Path, config: CLIPConfig, variables: Any, to: str) -> None:
    """Write a model in one of the formats of `WRITERS`: a file for "openai", a folder for the others.

    Raises:
      UserError: there is no such format, it cannot express the model, or `target` exists or cannot be written.
    """
    if to not in WRITERS:
        raise UserError(f"cannot write the format {to!r}; expected one of {', '.join(WRITERS)}")
    if config.classes and to != "jax":
        logger.warning(
            "the head of %d classes (%s, ...) is left out: %s has no place for it; a model folder of clip_jax keeps it",
            len(config.classes),
            ", ".join(config.classes[:3]),
            to,
        )
        config, variables = without_head(config, variables)
    WRITERS[to](Path(target), config, variables)


def without_head(config: CLIPConfig, variables: Any) -> tuple[CLIPConfig, Any]:
    """A model as the formats of others can express it."""
    params = {name: value for name, value in variables["params"].items() if name != "classifier"}
    return replace(config, classes=()), {**variables, "params": params}
