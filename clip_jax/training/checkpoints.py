"""The checkpoints of a run, under WORKDIR/checkpoints (step_folder.py says what each holds).

One that is damaged is set aside in WORKDIR/damaged, and the one before it used.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, Bool

from clip_jax import model_folder
from clip_jax.digests import digests, start_digests
from clip_jax.distributed import is_first, of_every_process, on_first_process, together
from clip_jax.errors import DamagedFile, RunStopped, UserError
from clip_jax.model_folder import DESCRIPTION, DESCRIPTION_FILE, RUN, RUN_FILE, VARIABLES
from clip_jax.training.config import RunConfig
from clip_jax.training.late_json import LateJson, LateJsonSave
from clip_jax.training.manifest import check_manifest, file_names, write_manifest
from clip_jax.training.state import TrainState
from clip_jax.training.step_folder import check_rest, description_of, is_listed, rest_names, rest_of
from clip_jax.training.storage import storage
from clip_jax.workdir import CHECKPOINTS, absolute, best_step

logger = logging.getLogger(__name__)

DAMAGED = "damaged"


class Checkpoints:
    """The checkpoints of one workdir: the newest few, every so many steps one, and the best of the evaluated.

    Saving is asynchronous; `close` waits for what is under way. All processes of a run call the same methods together.
    """

    def __init__(self, workdir: epath.PathLike, config: RunConfig):
        self._workdir, self._config = absolute(workdir), config
        self._folder = self._workdir / CHECKPOINTS
        with storage("open", self._folder):
            self._manager, self._saving = self._open(), 0

    def _open(self) -> ocp.CheckpointManager:
        keep = _Keep(self._workdir, self._config.keep_checkpoints, self._config.keep_every)
        rest = {name: ocp.StandardCheckpointHandler() for name in rest_names()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list_files),
        )
        late = {DESCRIPTION: LateJson(DESCRIPTION_FILE), RUN: LateJson(RUN_FILE)}
        handlers = {**model_folder.handlers(), **rest, **late}
        return ocp.CheckpointManager(self._folder, item_handlers=handlers, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Write `state` as the checkpoint of `step`, unless it is there already or has numbers that are not finite.

        Raises:
          RunStopped: it, or the one before, cannot be written.
        """
        if step == self.latest_step():
            return
        if not is_finite(state):
            logger.warning("step %d is not saved: it has numbers that are not finite", step)
            return
        config, rest = self._config, rest_of(state)
        # Begun here, before the next step takes the state's memory over, and waited for in the background.
        of_model, of_rest = start_digests(state.variables), start_digests(rest)
        items = {
            DESCRIPTION: LateJsonSave(lambda: model_folder.description_of(config.model, of_model())),
            VARIABLES: ocp.args.PyTreeSave(state.variables),
            **{name: ocp.args.StandardSave(value) for name, value in rest.items()},
            RUN: LateJsonSave(lambda: description_of(step, config, of_rest())),
        }
        with storage("write a checkpoint in", self._folder):
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole; None if none was ever written.

        Args:
          like: shapes, dtypes and shardings that are wanted, whatever devices the checkpoint was written from.

        Raises:
          UserError: the checkpoint is of another model.
          RunStopped: no checkpoint is whole, or none can be read.
        """
        while (step := of_every_process(self.latest_step())[0]) is not None:
            try:
                together(partial(self._check_files, step))
            except DamagedFile as damage:
                together(partial(self._confirm, step, damage))
                self._set_aside(step, damage)
                continue
            try:
                return self._restore(step, like)
            except DamagedFile as damage:
                self._set_aside(step, damage)
        if not (self._workdir / DAMAGED).exists():
            return None
        raise RunStopped(
            f"every checkpoint of {self._workdir} is damaged (they are in {self._workdir / DAMAGED}): put a copy of "
            f"one into {self._folder}, or begin again in another --workdir"
        )

    def wait(self) -> None:
        """Wait for saves under way.

        Raises:
          RunStopped: one failed.
        """
        with storage("write a checkpoint in", self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way, and end.

        Raises:
          RunStopped: one failed.
        """
        with storage("write a checkpoint in", self._folder):
            self._manager.close()

    def _list_files(self) -> None:
        """Orbax calls this in the background, when all is written and before it commits the checkpoint."""
        if is_first():
            unfinished = list(self._folder.glob(f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}*"))  # none in a bucket
            write_manifest(unfinished[0] if unfinished else self._folder / str(self._saving))

    def _check_files(self, step: int) -> None:
        """Compare this process's share of a checkpoint's files with their list."""
        folder = self._folder / str(step)
        with storage("read", folder):
            if is_listed(folder):
                check_manifest(folder, jax.process_index(), jax.process_count())

    def _confirm(self, step: int, damage: DamagedFile) -> None:
        """See that process 0, which would set the checkpoint aside, finds it damaged as well."""
        if not is_first():
            return
        folder = self._folder / str(step)
        try:
            with storage("read", folder):
                check_manifest(folder)
        except DamagedFile:
            return
        raise RunStopped(
            f"{damage}; but process 0 finds all files of {folder} whole: is the workdir shared by all hosts?"
        )

    def _restore(self, step: int, like: TrainState) -> TrainState:
        folder = self._folder / str(step)
        rest = {name: value for name, value in rest_of(like).items() if (folder / name).is_dir()}
        restored = together(partial(self._arrays, step, like.variables, rest))
        found = digests({name: restored[name] for name in rest})
        variables = restored.pop(VARIABLES)
        model_digests = digests(variables)

        def check() -> None:
            with storage("read", folder):
                model_folder.check_digests(folder, model_digests)
                check_rest(folder, step, found)

        together(check)
        return like.replace(
            step=jax.device_put(np.int32(step), like.step.sharding),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            **restored,
        )

    def _arrays(self, step: int, variables: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
        """The model's arrays and the rest, by item, onto the devices where those that are given are."""
        folder = self._folder / str(step)
        restore_args = ocp.checkpoint_utils.construct_restore_args(variables)
        items = {
            VARIABLES: ocp.args.PyTreeRestore(variables, restore_args=restore_args),
            **{name: ocp.args.StandardRestore(value) for name, value in rest.items()},
        }
        try:
            _check_shapes(self._manager.item_metadata(step)[VARIABLES], variables, folder)
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for missing, cut and altered files
            # All files of a list are as they were written, so that is not why; nor is it what is out of reach.
            if is_listed(folder) or isinstance(error, PermissionError | TimeoutError | ConnectionError):
                with storage("read", folder):
                    raise
            raise DamagedFile(model_folder.damage(folder, error)) from error

    def _set_aside(self, step: int, damage: DamagedFile) -> None:
        """Move a damaged checkpoint out of the way of the run, which will write that step again."""
        self._manager.close()
        target = self._workdir / DAMAGED / str(step)

        def move() -> None:
            free = next(path for path in _numbered(target) if not path.exists())
            with storage("set aside", self._folder / str(step)):
                _move(self._folder / str(step), free)
            logger.warning("%s; set aside as %s, going back to the checkpoint before", damage, free)

        on_first_process(move)
        self._manager = self._open()


@dataclass(frozen=True)
class _Keep:
    """Tells Orbax which checkpoints to keep, by the configuration and the workdir's metrics."""

    workdir: epath.Path
    newest: int
    every: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = {best_step(self.workdir, steps, averaged) for averaged in (False, True)}
        kept = {*sorted(steps)[-self.newest :], *best}
        return [step in kept or (self.every > 0 and step % self.every == 0) for step in steps]


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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


@jax.jit
def is_finite(state: TrainState) -> Bool[Array, ""]:
    """Of what is trained and its average. The moments of an accepted step are: its gradients and their squares were."""
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.ema, state.adapters))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _move(folder: epath.Path, target: epath.Path) -> None:
    """Move a folder, in a bucket object by object."""
    if "://" not in str(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return
    for name in file_names(folder):
        (folder / name).copy(target / name)
    folder.rmtree()


def _numbered(path: epath.Path) -> Iterator[epath.Path]:
    """path, path.1, path.2, ..."""
    yield path
    number = 0
    while True:
        number += 1
        yield path.with_name(f"{path.name}.{number}")
