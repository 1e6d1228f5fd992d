"""The checkpoints of a run, under WORKDIR/checkpoints (step_folder.py says what each holds).

One that is damaged is set aside in WORKDIR/damaged, and the one before it used.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, Bool

from clip_jax import model_folder
from clip_jax.digests import digests
from clip_jax.distributed import on_first_process, refused_by_any
from clip_jax.errors import DamagedFile, RunStopped, UserError
from clip_jax.model_folder import VARIABLES
from clip_jax.training.config import RunConfig
from clip_jax.training.manifest import check_manifest, file_names, write_manifest
from clip_jax.training.state import TrainState
from clip_jax.training.step_folder import RUN, RUN_FILE, check_rest, description_of, is_listed, rest_names, rest_of
from clip_jax.workdir import CHECKPOINTS, absolute, best_step

logger = logging.getLogger(__name__)

DAMAGED = "damaged"
# What Orbax, TensorStore and file systems raise.
_STORAGE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints of one workdir: the newest few, every so many steps one, and the best of the evaluated.

    Saving is asynchronous; `close` waits for what is under way. All processes of a run call the same methods together.
    """

    def __init__(self, workdir: epath.PathLike, config: RunConfig):
        self._workdir, self._config = absolute(workdir), config
        self._folder = self._workdir / CHECKPOINTS
        self._manager, self._saving = self._open(), 0

    def _open(self) -> ocp.CheckpointManager:
        keep = _Keep(self._workdir, self._config.keep_checkpoints, self._config.keep_every)
        rest = {name: ocp.StandardCheckpointHandler() for name in rest_names()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list_files),
        )
        handlers = {**model_folder.handlers(), **rest, RUN: ocp.JsonCheckpointHandler(RUN_FILE)}
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
        if not _is_finite(state):
            logger.warning("step %d is not saved: it has numbers that are not finite", step)
            return
        rest = rest_of(state)
        items = {
            **model_folder.items(self._config.model, state.variables, digests(state.variables)),
            **{name: ocp.args.StandardSave(value) for name, value in rest.items()},
            RUN: ocp.args.JsonSave(description_of(step, self._config, digests(rest))),
        }
        with self._storage("write"):
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
        while (step := self.latest_step()) is not None:
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
        with self._storage("write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way, and end.

        Raises:
          RunStopped: one failed.
        """
        with self._storage("write"):
            self._manager.close()

    def _list_files(self) -> None:
        """Orbax calls this in the background, when all is written and before it commits the checkpoint."""
        if jax.process_index() == 0:
            unfinished = list(self._folder.glob(f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}*"))  # none in a bucket
            write_manifest(unfinished[0] if unfinished else self._folder / str(self._saving))

    def _restore(self, step: int, like: TrainState) -> TrainState:
        folder = self._folder / str(step)
        listed = is_listed(folder)
        with self._storage("read"), _together(folder):
            if listed:
                check_manifest(folder, jax.process_index(), jax.process_count())
        rest = {name: value for name, value in rest_of(like).items() if (folder / name).is_dir()}
        with _together(folder):
            restored = self._arrays(step, like.variables, rest, listed)
        with _together(folder):
            model_folder.check_digests(folder, restored[VARIABLES])
            check_rest(folder, step, digests({name: restored[name] for name in rest}))
        variables = restored.pop(VARIABLES)
        return like.replace(
            step=jax.device_put(np.int32(step), like.step.sharding),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            **restored,
        )

    def _arrays(self, step: int, variables: Any, rest: Mapping[str, Any], listed: bool) -> dict[str, Any]:
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
            if listed:  # all files are as they were written, so that is not why
                raise
            raise DamagedFile(model_folder.damage(folder, error)) from error

    def _set_aside(self, step: int, damage: DamagedFile) -> None:
        """Move a damaged checkpoint out of the way of the run, which will write that step again."""
        self._manager.close()
        target = self._workdir / DAMAGED / str(step)

        def move() -> None:
            free = next(path for path in _numbered(target) if not path.exists())
            _move(self._folder / str(step), free)
            logger.warning("%s; set aside as %s, going back to the checkpoint before", damage, free)

        with self._storage("set aside"):
            on_first_process(move)
        self._manager = self._open()

    @contextmanager
    def _storage(self, verb: str) -> Iterator[None]:
        """What the disk or bucket refuses, as one line."""
        try:
            yield
        except UserError:
            raise
        except _STORAGE_ERRORS as error:
            steps = sorted(ocp.utils.checkpoint_steps(self._folder)) if self._folder.is_dir() else []
            safe = f"step {steps[-1]} is safe" if steps else "none is there yet"
            raise RunStopped(
                f"cannot {verb} a checkpoint in {self._folder}: {_shortened(error)}; {safe}; "
                "mend that, and run the same command again to go on"
            ) from error


@contextmanager
def _together(folder: epath.Path) -> Iterator[None]:
    """What one process finds damaged, all do."""
    damage = None
    try:
        yield
    except DamagedFile as error:
        damage = error
    if refused_by_any(damage is not None) and damage is None:
        raise DamagedFile(f"{folder} is damaged, as another process says")
    if damage is not None:
        raise damage


@dataclass(frozen=True)
class _Keep:
    """Orbax's question which checkpoints to keep, answered from the configuration and the workdir's metrics."""

    workdir: epath.Path
    newest: int
    every: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.newest :], best_step(self.workdir, steps)}
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
def _is_finite(state: TrainState) -> Bool[Array, ""]:
    """Of the model and the optimizer's state; the guard uses NaN for what is not there yet."""
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.ema))
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


def _shortened(error: Exception) -> str:
    """The end of the first line of an exception, where TensorStore says what the system said."""
    line = str(error).strip().split("\n")[0].partition(" [os_error_code")[0] or type(error).__name__
    return line if len(line) <= 200 else f"... {line[-200:]}"
