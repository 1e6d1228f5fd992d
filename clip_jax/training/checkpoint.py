"""Checkpoints of a run: model folders under WORKDIR/checkpoints with the optimizer's state beside the model, and the
resolved configuration in WORKDIR/config.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from clip_jax import model_folder
from clip_jax.digests import digests
from clip_jax.errors import UserError
from clip_jax.model_folder import DESCRIPTION, VARIABLES
from clip_jax.models import CLIPConfig
from clip_jax.training.state import TrainState
from clip_jax.workdir import BEST, CHECKPOINTS, RUN_CONFIG, absolute, best_step, write_whole

OPT_STATE = "opt_state"
KEEP = 3


class Checkpoints:
    """The checkpoints of one workdir: the newest few, and the best of those that were evaluated.

    Saving is asynchronous; `close` waits for what is under way.
    """

    def __init__(self, workdir: epath.PathLike, config: CLIPConfig):
        self._folder, self._config = absolute(workdir) / CHECKPOINTS, config
        options = ocp.CheckpointManagerOptions(preservation_policy=_NewestAndBest(absolute(workdir)))
        handlers = {**model_folder.handlers(), OPT_STATE: ocp.StandardCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, item_handlers=handlers, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Write `state` as the checkpoint of `step`, unless it is there already."""
        if step == self.latest_step():
            return
        model = model_folder.items(self._config, state.variables, digests(state.variables))
        items = ocp.args.Composite(**model, **{OPT_STATE: ocp.args.StandardSave(state.opt_state)})
        self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, with the shardings of `like` (whatever devices it was written from).

        Raises:
          UserError: the checkpoint is of another model, or damaged.
        """
        step = self.latest_step()
        folder = self._folder / str(step)
        try:
            _check_shapes(self._manager.item_metadata(step)[VARIABLES], like.variables, folder)
            items = {
                VARIABLES: ocp.args.PyTreeRestore(
                    like.variables, restore_args=ocp.checkpoint_utils.construct_restore_args(like.variables)
                ),
                OPT_STATE: ocp.args.StandardRestore(like.opt_state),
            }
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except UserError:
            raise
        except Exception as error:
            # Orbax and TensorStore raise many types for missing, cut and altered files.
            raise UserError(model_folder.damage(folder, error)) from error
        variables = restored[VARIABLES]
        model_folder.check_digests(folder, variables)
        return TrainState(
            step=jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), like.step.sharding),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=restored[OPT_STATE],
        )

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.close()


@dataclass(frozen=True)
class _NewestAndBest:
    """Orbax's question which checkpoints to keep, answered from the workdir's metrics."""

    workdir: epath.Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-KEEP:], best_step(self.workdir, steps)}
        return [step in kept for step in steps]


def _check_shapes(stored: Any, expected: Any, folder: epath.Path) -> None:
    """Refuse a checkpoint whose arrays are not those of the model, naming the first of them."""
    stored_shapes, expected_shapes = _shapes(stored), _shapes(expected)
    wrong = [
        f"{name} ({stored_shapes.get(name, 'missing')}, expected {expected_shapes.get(name, 'none')})"
        for name in sorted(set(stored_shapes) | set(expected_shapes))
        if stored_shapes.get(name) != expected_shapes.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder} is a checkpoint of another model: {', '.join(wrong[:3])}{more}")


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Whether `workdir` holds a complete checkpoint."""
    folder = absolute(workdir) / CHECKPOINTS
    return folder.is_dir() and bool(ocp.utils.checkpoint_steps(folder))


def make_workdir(workdir: epath.PathLike) -> None:
    """Create `workdir` if need be, and see that it can be written to.

    Raises:
      UserError: it is a file, or cannot be created or written to.
    """
    root = absolute(workdir)
    if (root / DESCRIPTION).exists() or (root / VARIABLES).exists() or str(workdir).endswith(BEST):
        raise UserError(f"{workdir} names a model, not the workdir of a run; give another --workdir")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".writable").write_text("")
        (root / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the workdir {workdir} ({error}); give another --workdir") from error


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Write config.json into an existing workdir, complete or not at all. Only process 0 does."""
    if jax.process_index() == 0:
        path = absolute(workdir) / RUN_CONFIG
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The configuration of the run in `workdir`; None if it holds none.

    Raises:
      UserError: config.json is not the JSON object that it should be.
    """
    path = absolute(workdir) / RUN_CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or start in another workdir") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must be an object, got {str(values)[:50]}; restore it, or start in another workdir")
    return values


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
