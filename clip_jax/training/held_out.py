"""WORKDIR/held_out.json: which images a run trains on, and which it is judged by.

{SOURCE: {"train": [...], "held_out": [...]}}    paths below the folder of the source
"""

import json

from etils import epath

from clip_jax.data.held_out import in_both
from clip_jax.data.sources import FolderConfig, held_out_of, source_config
from clip_jax.errors import UserError
from clip_jax.sealed_json import read_object
from clip_jax.training.config import RunConfig
from clip_jax.training.storage import storage
from clip_jax.workdir import HELD_OUT, absolute, steps_of, write_whole


def record_held_out(config: RunConfig, workdir: epath.PathLike) -> None:
    """Write the file, or see that a run that goes on still has the same parts; nothing where nothing is held out.

    Raises:
      UserError: a source trains on what another one holds out; or images were added, removed or renamed since the run
        began, so that what it has learned from could be in the other part now.
    """
    _check_apart(config)
    parts = {name: source.parts() for name, source in held_out_of(config.data).items()}
    file = absolute(workdir) / HELD_OUT
    if not parts:
        return
    if not (steps_of(workdir) and file.exists()):
        with storage("write", file):
            write_whole(file, json.dumps(parts, indent=1) + "\n")
        return
    before = read_object(file)
    for name, part in parts.items():
        if before.get(name) != part:
            raise UserError(
                f"the images of data.{name} are not those that this run began with, which {file} lists: put them "
                "back, or give another --workdir"
            )


def _check_apart(config: RunConfig) -> None:
    """See that no folder is trained on that has an image which another one holds out."""
    sources = {name: source_config(name, config.data[name]) for name in sorted(config.data)}
    folders = {name: source for name, source in sources.items() if isinstance(source, FolderConfig)}
    for name, source in held_out_of(config.data).items():
        for other in sorted(folders.keys() - {name}):
            if image := in_both(source.divided()[2].held_out, folders[other].trained()):
                raise UserError(
                    f"data.{name} holds out {image}, but data.{other} trains on it or on a copy of it: name a folder "
                    "in one source only, and keep copies in one folder"
                )
