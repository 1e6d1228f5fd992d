"""One checkpoint: a model folder with the rest of the training state beside the model.

STEP/description, STEP/variables   the model (clip_jax/model_folder.py)
STEP/opt_state, STEP/guard, ...    the rest of the state that the next step needs, an item each
STEP/run/run.json                  step, configuration, versions, and the digests of the rest of the state
STEP/files.json                    all files, with their checksums (manifest.py)
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clip_jax import model_folder
from clip_jax.digests import digest
from clip_jax.errors import DamagedFile
from clip_jax.model_folder import RUN, RUN_FILE
from clip_jax.options import to_dict
from clip_jax.sealed_json import check_seal, read_object, sealed
from clip_jax.training.config import RunConfig
from clip_jax.training.manifest import MANIFEST, check_manifest
from clip_jax.training.state import TrainState
from clip_jax.workdir import CHECKPOINTS, absolute, steps_of

_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def rest_names() -> list[str]:
    """The fields of the state that are neither the model nor the step."""
    return [item.name for item in fields(TrainState) if item.name not in ("step", "params", "batch_stats")]


def rest_of(state: TrainState) -> dict[str, Any]:
    """The rest of a state by item; what is empty has none."""
    rest = {name: getattr(state, name) for name in rest_names()}
    return {name: value for name, value in rest.items() if jax.tree.leaves(value)}


def description_of(step: int, config: RunConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """What run.json says: version, step, config, made_with (versions of packages), digests of the rest of the state."""
    made_with = {name: importlib.metadata.version(name) for name in _PACKAGES}
    config = json.loads(json.dumps(to_dict(config)))  # as it will be read
    return sealed({"version": _VERSION, "step": step, "config": config, "made_with": made_with, "digests": digests})


def read_description(folder: epath.Path) -> dict[str, Any]:
    """What run.json of a checkpoint says, which `description_of` made.

    Raises:
      DamagedFile: it is missing or damaged.
    """
    file = folder / RUN / RUN_FILE
    values = read_object(file)
    check_seal(values, file)
    return values


def is_listed(folder: epath.Path) -> bool:
    """Whether a checkpoint is of a version that lists its files and the digests of all arrays."""
    return (folder / MANIFEST).exists() or (folder / RUN).exists()


def check_rest(folder: epath.Path, step: int, found: Mapping[str, str]) -> None:
    """Compare the digests of the rest of the state with those that were written."""
    if not is_listed(folder):
        return
    written = read_description(folder)
    if written["step"] != step:
        raise DamagedFile(f"{folder} is damaged: it is the checkpoint of step {written['step']}")
    altered = sorted(path for path, value in found.items() if written["digests"].get(path) != value)
    missing = sorted(written["digests"].keys() - found.keys())
    if altered or missing:
        raise DamagedFile(f"{folder} is damaged: {(altered + missing)[0]} is not what was written")


def verify(folder: epath.Path) -> None:
    """Compare a checkpoint's files and arrays with what was written, on this host alone.

    Raises:
      DamagedFile: a file or an array is missing or altered; the message names it.
      UserError: its model is not usable.
    """
    if is_listed(folder):
        check_manifest(folder)
    model_folder.read(folder)
    rest = {name: read_arrays(folder / name) for name in rest_names() if (folder / name).is_dir()}
    paths = jax.tree_util.tree_leaves_with_path(rest)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): digest(array) for path, array in paths}
    check_rest(folder, int(folder.name), found)


def read_arrays(folder: epath.Path) -> Any:
    """The tree of one item as NumPy arrays, without knowing what it should be.

    Raises:
      DamagedFile: it cannot be read.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:
        raise DamagedFile(model_folder.damage(folder, error)) from error


def config_of_newest(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The configuration in the newest checkpoint that has a readable one; None if there is none."""
    for step in reversed(steps_of(workdir)):
        try:
            return read_description(absolute(workdir) / CHECKPOINTS / str(step))["config"]
        except DamagedFile:
            continue
    return None
