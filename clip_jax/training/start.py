"""WORKDIR/start: the model that a run started from, kept so that nothing needs the original again.

It is as the run saw it: resized, and with whatever started fresh. Before and after are compared by it, and
`python -m clip_jax.interpolate WORKDIR/start WORKDIR DST` is WiSE-FT.
"""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from clip_jax import model_folder
from clip_jax.digests import digests
from clip_jax.distributed import on_first_process
from clip_jax.models import CLIPConfig
from clip_jax.training.storage import storage
from clip_jax.workdir import START, absolute


def keep_start(workdir: epath.PathLike, config: CLIPConfig, variables: Any) -> None:
    """Write the model that a fresh run has; all processes of a run must call this together.

    The folder appears when it is complete. What an earlier life left there, which got to no checkpoint and may have
    started from something else, is replaced.

    Args:
      workdir: of the run.
      config: of the model.
      variables: its weights, on the devices.
    """
    folder = absolute(workdir) / START
    items = model_folder.items(config, variables, digests(variables))
    handler = ocp.CompositeCheckpointHandler(**model_folder.handlers())
    with storage("write", folder), ocp.Checkpointer(handler) as checkpointer:
        on_first_process(lambda: _remove(folder))
        checkpointer.save(folder, args=ocp.args.Composite(**items))


def _remove(folder: epath.Path) -> None:
    """Remove a folder and what is left of one that was being written."""
    for path in [folder, *folder.parent.glob(f"{folder.name}{ocp.utils.TMP_DIR_SUFFIX}*")]:
        if path.exists():
            path.rmtree()
