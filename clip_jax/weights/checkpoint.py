"""The converted checkpoint: a folder with the model's configuration as JSON and its weights in Orbax's format.

Orbax restores flipped bits without a word, so the JSON also holds a CRC-32 of every parameter.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.weights.files import appears_whole, read_json, write_json
from clip_jax.weights.mapping import leaves

CONFIG_FILE = "clip_jax.json"
VARIABLES = "variables"
VERSION = 1


def is_folder(path: Path) -> bool:
    """Whether `path` is a converted checkpoint."""
    return (path / CONFIG_FILE).is_file()


def write(folder: Path, config: CLIPConfig, variables: Any) -> None:
    """Write config and variables; the folder appears when it is complete.

    Raises:
      UserError: `folder` exists.
    """
    import orbax.checkpoint as ocp

    flat = {path: np.asarray(array, np.float32) for path, array in flatten_dict(variables, sep="/").items()}
    with appears_whole(folder) as temporary:
        # Compression saves a third of the space of weights that were float16, and takes several times as long to read.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(temporary.absolute() / VARIABLES, ocp.args.PyTreeSave(unflatten_dict(flat, sep="/")))
        digests = {path: _digest(array) for path, array in flat.items()}
        write_json(
            temporary / CONFIG_FILE,
            {"version": VERSION, "config": config.to_dict(), "crc32": digests},
        )


def read(folder: Path) -> tuple[CLIPConfig, Any]:
    """Config, and variables as float32 NumPy arrays.

    Raises:
      UserError: of another version, damaged, or not the parameters that the configuration asks for.
    """
    import orbax.checkpoint as ocp

    values = read_json(folder / CONFIG_FILE)
    if values.get("version") != VERSION:
        raise UserError(f"{folder} is a checkpoint of version {values.get('version')!r}, expected {VERSION}")
    digests = values.get("crc32")
    if not isinstance(values.get("config"), dict) or not isinstance(digests, dict):
        raise UserError(f"{folder / CONFIG_FILE} is damaged: config or crc32 is missing; convert it again")
    config = CLIPConfig.from_dict(values["config"])
    shapes = {leaf.path: leaf.shape for leaf in leaves(config)}
    as_numpy = unflatten_dict(dict.fromkeys(shapes, ocp.RestoreArgs(restore_type=np.ndarray)), sep="/")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            variables = checkpointer.restore(
                folder.absolute() / VARIABLES, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
        flat = flatten_dict(variables, sep="/")
    except Exception as error:
        # Orbax and TensorStore raise many types for missing, cut and altered files.
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {str(error)[:300]})") from error
    for path in shapes.keys() | flat.keys():
        if path not in flat or flat[path].shape != shapes.get(path) or _digest(flat[path]) != digests.get(path):
            raise UserError(f"{folder} is damaged: {path} is missing, superfluous or altered; convert it again")
    return config, variables


def _digest(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8))
