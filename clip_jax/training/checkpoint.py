"""Checkpoints of a run: Orbax under WORKDIR/checkpoints, the resolved configuration in WORKDIR/config.json."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from clip_jax.errors import UserError
from clip_jax.training.state import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
KEEP = 3


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; `close` waits for what is under way.

    The model's variables and the optimizer's state are separate items, so that evaluation reads only the first.
    """

    def __init__(self, workdir: str | epath.PathLike):
        self._manager = _manager(workdir, max_to_keep=KEEP)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Write `state` as the checkpoint of `step`, unless it is there already."""
        if step == self.latest_step():
            return
        items = ocp.args.Composite(
            variables=ocp.args.StandardSave(state.variables), opt_state=ocp.args.StandardSave(state.opt_state)
        )
        self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, with the shardings of `like` (whatever devices it was written from).

        Raises:
          UserError: the checkpoint is of another model.
        """
        step = self.latest_step()
        check_shapes(self._manager.item_metadata(step)["variables"], like.variables, f"step {step}")
        items = ocp.args.Composite(
            variables=ocp.args.StandardRestore(like.variables),
            opt_state=ocp.args.StandardRestore(like.opt_state),
        )
        restored = self._manager.restore(step, args=items)
        variables = restored["variables"]
        return TrainState(
            step=jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), like.step.sharding),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=restored["opt_state"],
        )

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.close()


def restore_variables(workdir: str | epath.PathLike, like: Any) -> tuple[int, Any]:
    """(step, variables) of the newest checkpoint of a workdir, with the shapes and shardings of `like`.

    Raises:
      UserError: there is no checkpoint, or it is of another model.
    """
    if not (_absolute(workdir) / CHECKPOINTS).is_dir():
        raise UserError(f"{workdir} holds no checkpoints; give the --workdir of a training run")
    with _manager(workdir, create=False) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{workdir} holds no finished checkpoint yet")
        check_shapes(manager.item_metadata(step)["variables"], like, f"{workdir}, step {step}")
        restored = manager.restore(step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(like)))
    return step, restored["variables"]


def _manager(workdir: str | epath.PathLike, **options: Any) -> ocp.CheckpointManager:
    handlers = {item: ocp.StandardCheckpointHandler() for item in ("variables", "opt_state")}
    return ocp.CheckpointManager(
        _absolute(workdir) / CHECKPOINTS, item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def check_shapes(stored: Any, expected: Any, where: str) -> None:
    """Refuse a checkpoint whose arrays are not those of the model.

    Raises:
      UserError: naming the first arrays that are missing, extra or of another shape.
    """
    stored_shapes, expected_shapes = _shapes(stored), _shapes(expected)
    wrong = [
        f"{name} ({stored_shapes.get(name, 'missing')}, expected {expected_shapes.get(name, 'none')})"
        for name in sorted(set(stored_shapes) | set(expected_shapes))
        if stored_shapes.get(name) != expected_shapes.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the checkpoint ({where}) is of another model: {', '.join(wrong[:3])}{more}")


def latest_step(workdir: str | epath.PathLike) -> int | None:
    """The step of the newest complete checkpoint in `workdir`; None if there is none."""
    if not (_absolute(workdir) / CHECKPOINTS).is_dir():
        return None
    with _manager(workdir, create=False) as manager:
        return manager.latest_step()


def make_workdir(workdir: str | epath.PathLike) -> None:
    """Create `workdir` if need be, and see that it can be written to. Only process 0 does.

    Raises:
      UserError: it is a file, or cannot be created or written to.
    """
    if jax.process_index() == 0:
        root = _absolute(workdir)
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / ".writable").touch()
            (root / ".writable").unlink()
        except OSError as error:
            raise UserError(f"cannot write to the workdir {workdir} ({error}); give another --workdir") from error


def write_config(workdir: str | epath.PathLike, config: Mapping[str, Any]) -> None:
    """Write config.json into an existing workdir, complete or not at all. Only process 0 does."""
    if jax.process_index() == 0:
        path = _absolute(workdir) / CONFIG_FILE
        part = path.with_name(CONFIG_FILE + ".part")
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        part.replace(path)


def read_config(workdir: str | epath.PathLike) -> dict[str, Any] | None:
    """The configuration of the run in `workdir`; None if it holds none.

    Raises:
      UserError: config.json is not the JSON object that it should be.
    """
    path = _absolute(workdir) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or start in another workdir") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must be an object, got {str(values)[:50]}; restore it, or start in another workdir")
    return values


def _absolute(workdir: str | epath.PathLike) -> epath.Path:
    path = epath.Path(workdir).expanduser()
    return path if "://" in str(workdir) else path.resolve()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
