"""A JSON file of a checkpoint whose content is not known yet when the checkpoint is begun."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orbax.checkpoint as ocp
from etils import epath


class LateJson(ocp.JsonCheckpointHandler):
    """Orbax's handler of JSON, but the content comes from a function that is called in the background."""

    async def _save_fn(self, content: Callable[[], Mapping[str, Any]], directory: epath.Path) -> None:
        await super()._save_fn(content(), directory)


@ocp.args.register_with_handler(LateJson, for_save=True)
@dataclass
class LateJsonSave(ocp.args.CheckpointArgs):
    """What to save with it: a function without arguments that returns the JSON object."""

    item: Callable[[], Mapping[str, Any]]


@ocp.args.register_with_handler(LateJson, for_restore=True)
class LateJsonRestore(ocp.args.JsonRestore):
    """Orbax wants one of its own for each handler."""
