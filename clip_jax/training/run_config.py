"""The run that a workdir holds: WORKDIR/config.json, of which every checkpoint has a copy."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from clip_jax.errors import DamagedFile, UserError
from clip_jax.model_folder import DESCRIPTION, VARIABLES
from clip_jax.sealed_json import read_object
from clip_jax.training.step_folder import config_of_newest
from clip_jax.training.storage import storage
from clip_jax.workdir import BEST, EMA, RUN_CONFIG, absolute, steps_of, write_whole

logger = logging.getLogger(__name__)


def make_workdir(workdir: epath.PathLike) -> None:
    """Create `workdir` if need be, and see that it can be written to.

    Raises:
      UserError: it is a file, or cannot be created or written to.
    """
    root = absolute(workdir)
    if (root / DESCRIPTION).exists() or (root / VARIABLES).exists() or str(workdir).endswith((BEST, EMA)):
        raise UserError(f"{workdir} names a model, not the workdir of a run; give another --workdir")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".writable").write_text("")
        (root / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the workdir {workdir} ({error}); give another --workdir") from error


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Write config.json into an existing workdir, complete or not at all."""
    path = absolute(workdir) / RUN_CONFIG
    with storage("write", path):
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_to_continue(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The configuration of the run in `workdir` that has checkpoints; None if it has none, and so nothing to continue.

    Raises:
      UserError: neither config.json nor a checkpoint tells it.
    """
    if not steps_of(workdir):
        return None
    file = absolute(workdir) / RUN_CONFIG
    try:
        return read_object(file)
    except DamagedFile as damage:
        kept = config_of_newest(workdir)
        if kept is None:
            raise UserError(f"{damage}; put it back, or start in another --workdir") from damage
        logger.warning("%s; the newest checkpoint has a copy of it", damage)
        return kept
