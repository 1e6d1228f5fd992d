"""Models on the Hugging Face hub, fetched through `huggingface_hub`: its cache, its tokens, its offline mode."""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_jax.errors import UserError
from clip_jax.model_folder import DESCRIPTION, DESCRIPTION_FILE, VARIABLES
from clip_jax.weights import huggingface, open_clip, tensor_file

logger = logging.getLogger(__name__)

_PREFIX = "hf-hub:"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SECONDS = 10.0  # to wait for the hub's answer, before the cache has to do
# A configuration, and the files of weights that may go with it, the best first.
_LAYOUTS = ((open_clip.CONFIG_FILE, open_clip.WEIGHT_FILES), ("config.json", huggingface.WEIGHT_FILES))
_MODEL_FOLDER = f"{DESCRIPTION}/{DESCRIPTION_FILE}"
_PROCESSING_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def is_name(source: str) -> bool:
    """Whether `source` can be a name on the hub: "hf-hub:ORG/NAME" or "ORG/NAME"."""
    return _NAME.fullmatch(source.removeprefix(_PREFIX)) is not None


def fetch(source: str) -> Path:
    """The local folder with the files of a model on the hub that reading it needs, downloaded if they are not there.

    The folder lies in huggingface_hub's cache. Where the hub cannot be reached, what the cache holds is taken.

    Args:
      source: "hf-hub:ORG/NAME" or "ORG/NAME".

    Raises:
      UserError: the hub has no such model, or cannot be reached and the cache does not hold it.
    """
    name = source.removeprefix(_PREFIX)
    try:
        with answers(source, "model"):
            import huggingface_hub

            info = huggingface_hub.HfApi().model_info(name, timeout=SECONDS)
            return _download(name, {file.rfilename for file in info.siblings or ()})
    except NoAnswer as error:
        if (folder := _cached(name)) is not None:
            logger.warning("%s: %s is taken from its cache", error.reason, name)
            return folder
        raise


class NoAnswer(UserError):
    """The hub did not answer.

    Attributes:
      reason: why.
    """

    def __init__(self, source: str, kind: str, reason: str):
        self.reason = f"the hub cannot be asked ({reason})"
        super().__init__(
            f"{source!r} is no file or folder here, nor in the cache of {kind}s from the hub, and the hub cannot "
            f"be asked: {reason}"
        )


@contextmanager
def answers(source: str, kind: str) -> Iterator[None]:
    """Say what an exception of the hub means.

    Args:
      source: what was asked for, as the user wrote it.
      kind: "model" or "data set".

    Raises:
      NoAnswer: nothing came.
      UserError: the hub has no such thing, does not give it to this user, or its library is missing.
    """
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"{source!r} is no file or folder here; to look for it on the hub: pip install huggingface_hub"
        ) from error
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"the hub gives {source} only to those who accepted its terms on its page; then set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{source!r} is no file or folder here, and the hub has no such {kind} (or it is private)"
        ) from error
    except Exception as error:
        # Its own errors, its HTTP library's (which differs by version) and the system's: all mean that nothing came.
        raise NoAnswer(source, kind, " ".join(str(error).split())[:200] or type(error).__name__) from error


def _download(name: str, available: Collection[str]) -> Path:
    wanted = _wanted(available)
    if wanted is None:
        known = " or ".join(f"{config} with {' or '.join(weights)}" for config, weights in _LAYOUTS)
        raise UserError(
            f"{name} on the hub holds no CLIP model that clip_jax reads: expected {_MODEL_FOLDER} or {known}"
        )
    folder = _snapshot(name, wanted)
    for index in (file for file in wanted if file.endswith(".index.json")):
        folder = _snapshot(name, tensor_file.shards(folder / index))
    return folder


def _wanted(available: Collection[str]) -> list[str] | None:
    """Patterns of the files to fetch: our model folder, or a configuration, weights (or their index) and processing."""
    if _MODEL_FOLDER in available:
        return [f"{DESCRIPTION}/*", f"{VARIABLES}/*"]
    for config, names in _LAYOUTS:
        weights = next((name for name in names if name in available), None)
        if config in available and weights is not None:
            return [config, weights, *(name for name in _PROCESSING_FILES if name in available)]
    return None


def _snapshot(name: str, files: list[str]) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))


def _cached(name: str) -> Path | None:
    """The folder of the version that was fetched last, if it has a model's files."""
    import huggingface_hub

    for config in (_MODEL_FOLDER, *(config for config, _ in _LAYOUTS)):
        path = huggingface_hub.try_to_load_from_cache(name, config)
        if isinstance(path, str):
            folder = Path(path.removesuffix(config))
            return folder if _wanted({str(file.relative_to(folder)) for file in folder.rglob("*")}) else None
    return None
