"""The collection `clip-benchmark/wds_*` on the Hugging Face hub: one split of a data set, fetched once."""

import logging
from fnmatch import fnmatch
from pathlib import Path

from clip_jax.data.access import Access
from clip_jax.data.wds import SHARD_COUNT, TEXT_FILES, is_wds
from clip_jax.errors import UserError
from clip_jax.weights import hub

logger = logging.getLogger(__name__)

_OWNER = "clip-benchmark"


def folder_name(name: str) -> str:
    """What the collection calls the repository or folder of a data set: `wds_vtab-pcam` for `vtab/pcam`."""
    return f"wds_{name.replace('/', '-')}"


def fetch(name: str, split: str, access: Access) -> str:
    """The folder with a split of a data set of the collection, in huggingface_hub's cache.

    What is not there yet is fetched, after a line with its size.

    Args:
      name: as the collection spells it, such as `vtab/cifar10`.
      split: such as `test`.
      access: whether it may be fetched.

    Raises:
      UserError: it is not in the cache and may not be fetched, or the hub does not give it.
    """
    repository = f"{_OWNER}/{folder_name(name)}"
    with hub.answers(repository, "data set"):
        if folder := _cached(repository, split):
            return folder
        if access.offline:
            raise UserError(f"{repository} is not in the cache of the hub and --offline fetches nothing")
        return _fetched(repository, split)


def _cached(repository: str, split: str) -> str | None:
    """The folder in the cache, if the whole split is there."""
    import huggingface_hub

    counter = huggingface_hub.try_to_load_from_cache(repository, f"{split}/{SHARD_COUNT}", repo_type="dataset")
    if not isinstance(counter, str):
        return None
    folder = str(Path(counter).parents[1])
    return folder if is_wds(folder, split, whole=True) else None


def _fetched(repository: str, split: str) -> str:
    import huggingface_hub

    info = huggingface_hub.HfApi().dataset_info(repository, files_metadata=True, timeout=hub.SECONDS)
    patterns = [f"{split}/*", *TEXT_FILES]
    wanted = [file for file in info.siblings or () if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    size = sum(file.size or 0 for file in wanted) / 2**30
    logger.info("fetching the %s split of %s from the hub: %.2f GiB", split, repository, size)
    return huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
